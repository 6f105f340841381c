"""`Linears` from stored tensors, and those of calls that come again."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vqllm_kernels.cpu.chains import Chain, chain
from vqllm_kernels.cpu.kernels import PackedKernels
from vqllm_kernels.cpu.linear import Linears
from vqllm_kernels.cpu.parts import Member, Part
from vqllm_kernels.linear import BoundLinear

_kept = WeakTensorKeyDictionary()
"""First tensor of a call -> (what it was made of, its `Linears` or None)."""


def linears_of(every: Sequence[BoundLinear]) -> Linears | str:
    """Linears of one input as one call, or why they cannot be.

    Args:
        every: their tensors have to stay as they are for as long as the result is used; it knows
            their addresses, and has what was computed from their signs and scales.
    """
    with torch.inference_mode(False), torch.no_grad():
        first = every[0]
        into = chain(first.inputs, first.spec.cols, "input")
        if isinstance(into, str):
            return into
        members = []
        for linear in every:
            spec = linear.spec
            kernels = spec.format.kernels("packed")
            if not isinstance(kernels, PackedKernels):
                return f"{spec.format.format_id} has no packed product"
            out = chain(linear.outputs, spec.rows, "output")
            if isinstance(out, str):
                return out
            members.append(Member(spec.rows, spec.cols, kernels.parts(linear.own), out))
        return Linears(into, members)


def without_transforms(parts: Sequence[Sequence[Part]], rows: Sequence[int], cols: int) -> Linears:
    """The products alone, of several linears of one input."""
    members = []
    for own, size in zip(parts, rows, strict=True):
        members.append(Member(size, cols, own, _plain(size, "output")))
    return Linears(_plain(cols, "input"), members)


def kept(
    packed: Sequence[Tensor], key: object, every: Callable[[], Sequence[BoundLinear]]
) -> Linears | None:
    """`linears_of` for calls that come again with the same tensors; None if it has a reason.

    Args:
        packed: all stored tensors.
        key: of the specs.
        every: gives the linears.
    """
    made_of = (key, tuple((t.data_ptr(), _version(t)) for t in packed))
    found = _kept.get(packed[0])
    if found is None or found[0] != made_of:
        linears = linears_of(every())
        found = (made_of, None if isinstance(linears, str) else linears)
        _kept[packed[0]] = found
    return found[1]


def _plain(size: int, direction: str) -> Chain:
    found = chain((), size, direction)
    assert not isinstance(found, str)
    return found


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
