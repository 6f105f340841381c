"""Products of linears of one input with their packed weights, one compiled call on a CPU.

In a graph of torch.compile such a call is one operator, `vqllm::packed_products`. It takes x and a
number that stands for the linears, in a tensor, and not their packed tensors: the 1,680 of the demo
model as inputs of a graph would be looked at one by one at every token. A number in a tensor does
not make a graph of its own for each layer, as a constant would.
"""

import weakref
from collections.abc import Sequence
from itertools import count
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

    def __init__(self, members: Sequence["VQLinear"]) -> None:
        """For these linears, which it does not keep alive."""
        self._members = [weakref.ref(member) for member in members]
        self._rows = [member.out_features for member in members]
        number = next(_NUMBERS)
        _BY_NUMBER[number] = self
        with torch.inference_mode(False):
            self._number = torch.tensor(number, device="cpu")
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
            or torch.compiler.is_compiling()
            or not _may_serve(x)
            or dispatch.is_forced()
            or not made_from.holds()
        ):
            return None
        return None if self._linears is None else self._linears(x)

    def __call__(self, members: Sequence["VQLinear"], x: Tensor) -> list[Tensor] | None:
        """y of each member, without bias; None where there is no such call, or x is not finite.

        Args:
            members: those that it was made for.
            x: [..., cols], with a row at least.
        """
        if torch.compiler.is_compiling():
            return torch.ops.vqllm.packed_products(x, self._number, self._rows)
        if self._made_from is None or not self._made_from.holds():
            self._make(members, x)
        self._dtype = x.dtype
        return None if self._linears is None else self._linears(x)

    def whatever_comes(self, x: Tensor) -> list[Tensor]:
        """The same for a graph, which cannot choose any more: by the definition of the formats
        where there is no such call."""
        ys = self.again(x)
        if ys is not None:
            return ys
        members = [member for ref in self._members if (member := ref()) is not None]
        if serve(members, x) and not dispatch.is_forced():
            ys = self(members, x)
        if ys is None:
            packed, specs = [m.packed for m in members], [m.spec for m in members]
            ys = dispatch.linears(x, packed, specs, [None] * len(members))
        return ys

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
    now: where no gradient of x is wanted, which takes decoded weights, and not in an exported
    graph, which other processes run."""
    return _may_serve(x) and all_packed(members, x.dtype)


def all_packed(members: Sequence["VQLinear"], dtype: torch.dtype) -> bool:
    """Whether the codes of all of them are multiplied as they are stored, on a CPU."""
    return all(dispatch.multiplied_packed(member.spec.format, dtype) for member in members)


def _may_serve(x: Tensor) -> bool:
    """The part of `serve` that depends on x."""
    return (
        x.is_cpu
        and x.numel() > 0
        and not torch.compiler.is_exporting()
        and not (x.requires_grad and torch.is_grad_enabled())
    )


_NUMBERS = count()
_BY_NUMBER: weakref.WeakValueDictionary[int, PackedProducts] = weakref.WeakValueDictionary()


def _operator(x: Tensor, number: Tensor, rows: list[int]) -> list[Tensor]:
    return _BY_NUMBER[int(number)].whatever_comes(x)


def _shapes(x: Tensor, number: Tensor, rows: list[int]) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], own) for own in rows]


_LIBRARY = torch.library.Library("vqllm", "DEF")
_LIBRARY.define("packed_products(Tensor x, Tensor number, int[] rows) -> Tensor[]")
_LIBRARY.impl("packed_products", _operator, "CompositeExplicitAutograd")
torch.library.register_fake("vqllm::packed_products", _shapes, lib=_LIBRARY)
