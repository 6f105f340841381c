"""How a linear is stored: its format, its transforms, and the scales that training adds.

linear_spec   what codec and transforms of a recipe make of a matrix
stored_spec   the same with the scales of rows that a recipe trains while layers are rounded
transformed   the weights and H in the basis in which they are coded
scaled        a packed linear with its outputs or inputs multiplied by stored scales
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vqllm.core import rng
from vqllm.core.protocols import State
from vqllm.errors import NumericalError
from vqllm.recipes import Recipe
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.transforms import ScaleSpec


def linear_spec(rows: int, cols: int, recipe: Recipe) -> LinearSpec:
    """How a linear of W [rows, cols] is stored."""
    transforms = tuple(
        transform.spec(cols if transform.side == "in" else rows) for transform in recipe.transforms
    )
    return LinearSpec(rows=rows, cols=cols, format=recipe.codec.spec(), transforms=transforms)


def stored_spec(rows: int, cols: int, recipe: Recipe) -> LinearSpec:
    """How a linear of W [rows, cols] is stored in the end: with the scales of its rows, where the
    recipe trains them."""
    spec = linear_spec(rows, cols, recipe)
    if recipe.layer is None or "rows" not in recipe.layer.train:
        return spec
    return with_scale(spec, "out")[0]


@dataclass
class Transformed:
    """A linear on its way through the transforms."""

    W_RC: Tensor
    states: list[State]


def transformed(
    weights: Mapping[str, Tensor],
    H_CC: Tensor,
    recipe: Recipe,
    own: Mapping[str, Recipe] | None = None,
) -> tuple[dict[str, Transformed], Tensor]:
    """Apply the transforms in order: those of the input side once for the whole group (fitted on
    all its rows), those of the output side to each linear.

    Args:
        own: recipes of linears whose transforms end elsewhere, by name.
    """
    own = own or {}
    linears = {name: Transformed(W_RC, []) for name, W_RC in weights.items()}
    leader = next(iter(weights))
    for i, transform in enumerate(recipe.transforms):
        purpose = f"transform{i}"
        if transform.side == "in":
            stacked = torch.cat([linear.W_RC for linear in linears.values()])
            generator = rng.generator(recipe.seed, leader, purpose)
            transform = own.get(leader, recipe).transforms[i]
            stacked, H_CC, state = transform.forward(stacked, H_CC, generator)
            parts = stacked.split([linear.W_RC.shape[0] for linear in linears.values()])
            for linear, part in zip(linears.values(), parts):
                linear.W_RC = part
                linear.states.append(state)
        else:
            for name, linear in linears.items():
                generator = rng.generator(recipe.seed, name, purpose)
                transform = own.get(name, recipe).transforms[i]
                linear.W_RC, _, state = transform.forward(linear.W_RC, H_CC, generator)
                linear.states.append(state)
    return linears, H_CC


def with_scale(spec: LinearSpec, side: str) -> tuple[LinearSpec, int]:
    """How a linear is stored that has a float16 scale first on a side, and the place of the scale.

    A scale that stands first on that side becomes it; otherwise a new one stands before all
    transforms.
    """
    transforms = list(spec.transforms)
    first = next((i for i, t in enumerate(transforms) if t.side == side), None)
    size = spec.rows if side == "out" else spec.cols
    new = ScaleSpec(side=side, size=size)  # type: ignore[arg-type]
    place = 0
    if first is not None and isinstance(transforms[first], ScaleSpec):
        transforms[first], place = new, first
    else:
        transforms.insert(0, new)
    changed = LinearSpec(
        rows=spec.rows, cols=spec.cols, format=spec.format, transforms=tuple(transforms)
    )
    return changed, place


def scaled(
    name: str, spec: LinearSpec, tensors: Mapping[str, Tensor], side: str, factor: Tensor
) -> tuple[LinearSpec, dict[str, Tensor]]:
    """A packed linear with its outputs (side "out", [R]) or inputs ("in", [C]) multiplied.

    Stored as `with_scale` says.
    """
    own, states = spec.split(dict(tensors))
    changed, place = with_scale(spec, side)
    old = spec.transforms[place] if spec.transforms else None
    if isinstance(old, ScaleSpec) and len(changed.transforms) == len(spec.transforms):
        factor = factor * old.scale(states[place]).float()
    else:
        states.insert(place, {})
    scale = as_stored(f"scales of {name}", factor, torch.float16)
    if bool((scale == 0).any()):
        raise NumericalError(
            f"scales of {name} were tuned to values as small as {float(factor.abs().min()):.3g}, "
            "which are 0 in float16: lower `rate`."
        )
    states[place] = {"scale": scale}
    stored = {f"t{i}_{key}": t for i, state in enumerate(states) for key, t in state.items()}
    return changed, {**own, **stored}


def as_stored(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    stored = values.to(dtype)
    if not bool(stored.isfinite().all()):
        raise NumericalError(
            f"{name}: tuned to values up to {float(values.abs().max()):.3g}, which {dtype} does "
            "not hold: lower `rate`."
        )
    return stored
