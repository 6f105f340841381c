"""Products of linears of one input with their packed weights, one compiled call on a CPU."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vqllm.runtime.packed import Fingerprint
from vqllm_kernels import dispatch
from vqllm_kernels.linear import BoundLinear

if TYPE_CHECKING:
    from vqllm.runtime.linear import VQLinear
    from vqllm_kernels.cpu.linear import Linears


class PackedProducts:
    """What such a call needs, made at the first one and again when a packed tensor has changed."""

    def __init__(self) -> None:
        self._linears: Linears | None = None
        self._made_from: Fingerprint | None = None
        self._dtype: torch.dtype | None = None
        self.have_bias = True
        """Whether a member may have a bias: asked of modules, it takes a microsecond each."""

    @property
    def nbytes(self) -> int:
        """What is kept beside the packed tensors."""
        return 0 if self._linears is None else self._linears.nbytes

    def again(self, x: Tensor) -> list[Tensor] | None:
        """What `__call__` gives, if it served such an x before and nothing has changed since; else
        None. One look at what can change is all that a small linear has time for: 10 us in place of
        60 for q, k and v of the demo model."""
        made_from = self._made_from
        if (
            made_from is None
            or x.dtype is not self._dtype
            or not _may_serve(x)
            or dispatch.is_forced()
            or not made_from.holds()
        ):
            return None
        return None if self._linears is None else self._linears(x)

    def __call__(self, members: Sequence["VQLinear"], x: Tensor) -> list[Tensor] | None:
        """y of each member, without bias; None where there is no such call, or x is not finite.

        Args:
            members: always the same.
            x: [..., cols], with a row at least.
        """
        if self._made_from is None or not self._made_from.holds():
            self._make(members, x)
        self._dtype = x.dtype
        return None if self._linears is None else self._linears(x)

    def _make(self, members: Sequence["VQLinear"], x: Tensor) -> None:
        from vqllm_kernels.cpu.bound import linears_of

        for member in members:
            dispatch.choose(x.reshape(-1, x.shape[-1]), member.spec.format)
        made = linears_of([BoundLinear.of(member.spec, member.packed) for member in members])
        self._linears = None if isinstance(made, str) else made
        self._made_from = Fingerprint(members)
        self.have_bias = any(member.bias is not None for member in members)


def serve(members: Sequence["VQLinear"], x: Tensor) -> bool:
    """Whether the products of these linears with x are made from packed weights on a CPU, here and
    now: outside of a graph, and where no gradient of x is wanted, which takes decoded weights."""
    return _may_serve(x) and all_packed(members, x.dtype)


def all_packed(members: Sequence["VQLinear"], dtype: torch.dtype) -> bool:
    """Whether the codes of all of them are multiplied as they are stored, on a CPU."""
    return all(dispatch.multiplied_packed(member.spec.format, dtype) for member in members)


def _may_serve(x: Tensor) -> bool:
    """The part of `serve` that depends on x."""
    return (
        x.is_cpu
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not (x.requires_grad and torch.is_grad_enabled())
    )
