"""Packed linears of one input, held by a module of vLLM, and their products."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqllm.core.tensors import frozen
from vqllm.integrations.vllm.stored import WEIGHT
from vqllm_kernels import dispatch, ops
from vqllm_kernels.linear import BoundLinear, LinearSpec

if TYPE_CHECKING:
    from vqllm_kernels.cpu.linear import Linears

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Together:
    """Linears whose transforms of the input are equal: one call of an operator."""

    parts: list[int]
    names: list[str]
    """The parameters that hold their tensors, in the order of the operator."""
    texts: list[str]
    rows: list[int]
    cols: int
    compiled: "Linears | None"
    """One call of compiled code on a CPU, if there is one. It takes 10 us less than the operator
    and does not look whether the tensors are still the same: after loading vLLM leaves them."""


@dataclass(frozen=True)
class PackedLinears:
    """Linears of one input, some of which may be dense."""

    together: list[Together]
    dense: dict[int, str]
    """The parameter of each dense part."""

    @classmethod
    def of(
        cls,
        layer: nn.Module,
        parts: Sequence[tuple[LinearSpec | None, Tensors]],
        dtype: torch.dtype,
        prefix: str = "vqllm_",
    ) -> "PackedLinears":
        """Register the tensors as parameters of `layer`, and see which parts go together.

        Args:
            dtype: of the activations.
        """
        dense: dict[int, str] = {}
        alike: dict[Any, list[int]] = {}
        names: dict[int, list[str]] = {}
        for i, (spec, own) in enumerate(parts):
            names[i] = [f"{prefix}{i}_{name}" for name in sorted(own)]
            for registered, name in zip(names[i], sorted(own)):
                layer.register_parameter(registered, frozen(own[name].contiguous()))
            if spec is None:
                dense[i] = f"{prefix}{i}_{WEIGHT}"
            else:
                alike.setdefault(_input_key(spec, own), []).append(i)
        together = []
        for members in alike.values():
            specs = [spec for i in members if (spec := parts[i][0]) is not None]
            together.append(_together(layer, specs, members, names, dtype))
        return cls(together, dense)

    def __call__(self, layer: nn.Module, x: Tensor) -> list[Tensor]:
        """y of each part, without bias.

        Args:
            x: [..., cols].
        """
        ys: dict[int, Tensor] = {}
        for group in self.together:
            ys.update(zip(group.parts, _products(layer, group, x)))
        for i, name in self.dense.items():
            ys[i] = F.linear(x, getattr(layer, name))
        return [ys[i] for i in range(len(ys))]


def _products(layer: nn.Module, group: Together, x: Tensor) -> list[Tensor]:
    if group.compiled is not None and not torch.compiler.is_compiling() and x.numel():
        ys = group.compiled(x)
        if ys is not None:
            return ys
    packed = [getattr(layer, name) for name in group.names]
    return torch.ops.vqllm_kernels.linears(x, packed, group.texts, group.rows, group.cols)


def _together(
    layer: nn.Module,
    specs: list[LinearSpec],
    members: list[int],
    names: dict[int, list[str]],
    dtype: torch.dtype,
) -> Together:
    bound = [
        BoundLinear.of(
            spec, dict(zip(sorted(spec.layout()), (getattr(layer, n) for n in names[i])))
        )
        for spec, i in zip(specs, members)
    ]
    return Together(
        members,
        [name for i in members for name in names[i]],
        [ops.text_of(spec) for spec in specs],
        [spec.rows for spec in specs],
        specs[0].cols,
        _compiled(bound, dtype),
    )


def _compiled(bound: list[BoundLinear], dtype: torch.dtype) -> "Linears | None":
    first = next(iter(bound[0].own.values()))
    if first.device.type != "cpu":
        return None
    if not all(dispatch.multiplied_packed(linear.spec.format, dtype) for linear in bound):
        return None
    from vqllm_kernels.cpu.bound import linears_of

    linears = linears_of(bound)
    return None if isinstance(linears, str) else linears


def _input_key(spec: LinearSpec, own: Tensors) -> Any:
    """Equal for linears whose transforms of the input are, byte for byte."""
    key: list[Any] = []
    for i, transform in enumerate(spec.transforms):
        if transform.side == "in":
            states = (own[f"t{i}_{name}"] for name in sorted(transform.layout()))
            contents = (t.cpu().contiguous().view(torch.uint8) for t in states)
            key += [transform, *(t.numpy().tobytes() for t in contents)]
    return tuple(key)
