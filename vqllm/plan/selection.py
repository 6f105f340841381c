"""Which linears of a model are quantized."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from torch import nn

from vqllm.hf.decoder_layers import linears_of
from vqllm.hf.linears import shared_modules
from vqllm.plan.costs import Shape, layouts, option_costs
from vqllm.plan.cuts import Cut, cuts_of
from vqllm.plan.kept import kept_linears
from vqllm.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The linears of the decoder layers, divided. All names are full names."""

    shapes: Mapping[str, Shape]
    """rows and columns of those that are to be quantized, in the order of the layers"""
    limits: Mapping[str, float]
    """bits that each must take less of: those of its weights in the source model; infinite where
    the recipe lets matrices become larger"""
    kept: Mapping[str, str]
    """why others stay as they are, where it is not by name"""
    larger: Mapping[str, str]
    """those of them that no codec of the recipe would make smaller"""
    num_in_layers: int
    """parameters of the decoder layers, whatever holds them"""
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    """where processes that share out the model cut its linears, if the recipe is made for that"""

    @property
    def share(self) -> float:
        """Of those parameters that are to be quantized."""
        num = sum(rows * cols for rows, cols in self.shapes.values())
        return num / max(self.num_in_layers, 1)

    def of(self, linears: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
        """Those of these linears that are to be quantized."""
        return {name: linear for name, linear in linears.items() if name in self.shapes}


def select(
    model: nn.Module,
    layers: Collection[str],
    recipe: Recipe,
    stored_bytes: Callable[[Iterable[str]], int],
    why_unnamed: Callable[[str, tuple[str, ...]], str | None] = lambda name, tensors: None,
) -> Selection:
    """Divide the linears of a model's decoder layers.

    Args:
        model: the whole model; its tensors may be on the meta device.
        layers: full names of its decoder layers.
        stored_bytes: of parameters of these full names in the source model; 0 where that is not
            known, which makes it the size in `model`.
        why_unnamed: the reason why a module cannot have tensors of these names in the files; None
            if it can.
    """
    shapes: dict[str, Shape] = {}
    limits: dict[str, float] = {}
    kept: dict[str, str] = {}
    larger: dict[str, str] = {}
    names_of = cache(lambda shape: layouts(shape, recipe))
    least_bits = cache(lambda shape: min(option_costs(shape, recipe)))
    shared = shared_modules(model, layers)
    for layer_name in layers:
        layer = model.get_submodule(layer_name)
        own = kept_linears(layer, recipe.skip_kinds)
        kept |= {f"{layer_name}.{name}": reason for name, reason in own.items()}
        for name, linear in linears_of(layer, layer_name, shared).items():
            if name in kept or any(re.search(pattern, name) for pattern in recipe.skip):
                continue
            shape = linear.out_features, linear.in_features
            dense = 8 * (stored_bytes([f"{name}.weight"]) or linear.weight.nbytes)
            limit = dense if "larger" in recipe.skip_kinds else math.inf
            reasons = {why_unnamed(name, tensors) for tensors in names_of(shape)} - {None}
            if reasons:
                kept[name] = min(map(str, reasons))
            elif least_bits(shape) < limit:
                shapes[name], limits[name] = shape, limit
            else:
                larger[name] = _would_be_larger(shape, least_bits(shape), dense)
    inside = {id(p): p.numel() for n in layers for p in model.get_submodule(n).parameters()}
    return Selection(
        shapes=shapes,
        limits=limits,
        kept=kept | larger,
        larger=larger,
        num_in_layers=sum(inside.values()),
        cuts=cuts_of(model, shapes, recipe),
    )


def _would_be_larger(shape: Shape, packed_bits: int, dense_bits: int) -> str:
    rows, cols = shape
    packed, dense = (f"{bits / (rows * cols):.3g}" for bits in (packed_bits, dense_bits))
    return (
        f"packed it would not be smaller ({rows} x {cols}: {packed} bits a weight, {dense} as it "
        "is)"
    )
