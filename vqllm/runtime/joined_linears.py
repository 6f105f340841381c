"""Linears that read the same tensor (q, k, v; gate, up), multiplied together at the first call.

A model calls them one by one with one and the same tensor. The first call computes all products:
with kept weights one product with the stacked matrix, otherwise one operator that transforms the
input once and multiplies equal formats in one launch. The other calls take what is theirs. The demo
model has 7 linears a layer and 4 inputs; decoding one token on two CPU cores takes 0.96 to 1.01 of
the original's time so.

A member takes a product only if its input is the very tensor that it was computed from, unchanged
since, with gradients recorded as they were then. A product that nobody takes makes the members go
alone until all of them have been seen to read one tensor again. Not noticed are changes between the
calls of two members for one input: of packed weights, and in inference mode, where tensors have no
versions, of the input.
"""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from vqllm.runtime import cache
from vqllm.runtime.packed import Fingerprint, version
from vqllm.runtime.packed_products import PackedProducts, all_packed, serve
from vqllm_kernels import dispatch

if TYPE_CHECKING:
    from vqllm.runtime.linear import VQLinear


def _state(x: Tensor) -> tuple[int, bool, bool]:
    """The version of x, whether gradients are recorded, and whether in inference mode."""
    if torch.compiler.is_compiling():
        # A graph has no versions: who writes into x there makes a new tensor of it.
        return 0, torch.is_grad_enabled(), False
    return version(x), torch.is_grad_enabled(), torch.is_inference_mode_enabled()


class JoinedLinears:
    """Two or more linears whose input, and what is done to it before the product, is the same."""

    def __init__(self, members: Sequence["VQLinear"]) -> None:
        self._left: list[weakref.ref[VQLinear]] = []
        self._members = [weakref.ref(member, self._left.append) for member in members]
        self._rows = [member.out_features for member in members]
        self._ids = [id(member) for member in members]
        self._stacked: Tensor | None = None
        self.products = PackedProducts(members)
        self._has_bias = False
        self._decoded_from: Fingerprint | None = None
        self._agreed: Fingerprint | None = None
        self._ahead: tuple[Tensor, tuple[int, bool, bool], dict[int, Tensor]] | None = None
        """an input, its state, and its products that were not asked for yet, by ids of members"""
        self._is_trusted = True
        self._seen: tuple[weakref.ref[Tensor] | None, set[int]] = (None, set())

    @property
    def members(self) -> list["VQLinear"]:
        """Those that are still there."""
        found = [ref() for ref in self._members]
        return [member for member in found if member is not None]

    def output(self, member: "VQLinear", x: Tensor) -> Tensor | None:
        """The product of one member, or None: then it goes alone."""
        ahead = self._ahead
        if ahead is not None:
            seen, state, outputs = ahead
            if seen is x and state == _state(x) and id(member) in outputs:
                if len(outputs) == 1:
                    self._ahead = None
                return outputs.pop(id(member))
        if id(member) not in self._ids:  # a copy of a member, with the group of the original
            return None
        if ahead is not None:
            self._ahead, self._is_trusted = None, False
        if not self._is_trusted:
            self._watch(id(member), x)
            return None
        parts = self._products(x)
        if parts is None:
            return None
        outputs = dict(zip(self._ids, parts))
        y = outputs.pop(id(member))
        self._ahead = x, _state(x), outputs
        return y

    def forget(self) -> None:
        """Drop the stacked weights and what was computed ahead; members drop their parts."""
        self._stacked = self._decoded_from = self._ahead = None

    def _drop_weights(self, members: list["VQLinear"]) -> None:
        if self._stacked is not None and not torch.compiler.is_compiling():
            self._stacked = self._decoded_from = None
            for member in members:
                member.forget()

    def _watch(self, member_id: int, x: Tensor) -> None:
        """Trust again once all members were called with one tensor."""
        last, ids = self._seen
        ids = {*ids, member_id} if last is not None and last() is x else {member_id}
        self._is_trusted = len(ids) == len(self._members)
        self._seen = (None, set()) if self._is_trusted else (weakref.ref(x), ids)

    def _products(self, x: Tensor) -> Sequence[Tensor] | None:
        if self._left:
            return None
        ys = self.products.again(x)
        if ys is not None:
            return self._with_biases(ys, x.dtype)
        members = self.members
        faster = [member.is_faster_packed(x) for member in members]
        if all(faster) and serve(members, x) and self._inputs_agree(members):
            self._drop_weights(members)
            ys = self.products(members, x)
            if ys is not None:
                return self._with_biases(ys, x.dtype)
        elif any(faster) and not all_packed(members, x.dtype):
            return None  # some are looked up, alone
        compiling = torch.compiler.is_compiling()
        W_RC = None if all(faster) else self._weights(x, compiling)
        if W_RC is None:
            self._drop_weights(members)
            if not self._inputs_agree(members):
                return None
            packed = [member.packed for member in members]
            specs = [member.spec for member in members]
            parts = dispatch.linears(x, packed, specs, self._biases(x.dtype))
        else:
            bias = None
            if self._has_bias or compiling:
                bias = _stacked(self._biases(x.dtype), self._rows)
            parts = F.linear(x, W_RC, bias).split_with_sizes(self._rows, -1)
        if torch.is_grad_enabled():  # several results of one product could not be written into
            return [part.clone(memory_format=torch.contiguous_format) for part in parts]
        if x.numel() > x.shape[-1]:  # of a single row they are contiguous, as linears' are
            return [part.contiguous() for part in parts]
        return parts

    def _with_biases(self, ys: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        if not self.products.have_bias:
            return ys
        return [y if b is None else y + b for y, b in zip(ys, self._biases(dtype))]

    def _biases(self, dtype: torch.dtype) -> list[Tensor | None]:
        return [None if m.bias is None else m.bias.to(dtype) for m in self.members]

    def _inputs_agree(self, members: list["VQLinear"]) -> bool:
        """Whether the transforms of the input are still equal: they are applied once for all."""
        if torch.compiler.is_compiling():
            return True
        if self._agreed is None or not self._agreed.holds():
            if len({input_key(member) for member in members}) > 1:
                return False
            self._agreed = Fingerprint(members)
        return True

    def _weights(self, x: Tensor, compiling: bool) -> Tensor | None:
        """The decoded weights of all members, one below the other; each member keeps its part. None
        where no weights are kept."""
        kept, origin = self._stacked, self._decoded_from
        if kept is not None and kept.dtype != x.dtype:
            kept = None
        # Where the tensors are what they were, they are not offloaded either: that replaces them.
        if not compiling and kept is not None and origin is not None and origin.holds():
            return kept
        members = self.members
        if not cache.keeps_weights(x.device) or any(m.is_offloaded() for m in members):
            return None
        if compiling:  # as with a single linear: a graph takes what an earlier call decoded
            return kept
        with torch.inference_mode(False), torch.no_grad():
            shape = sum(self._rows), members[0].in_features
            stacked = torch.empty(shape, dtype=x.dtype, device=members[0].device)
            for member, part in zip(members, stacked.split(self._rows)):
                part.copy_(member.dequantize(x.dtype))
                member.keep(part)
        self._stacked, self._decoded_from = stacked, Fingerprint(members)
        self._has_bias = any(member.bias is not None for member in members)
        return stacked


def input_key(linear: "VQLinear") -> object | None:
    """What is equal for linears of one input, and for no others; None if that cannot be known."""
    if linear.device.type == "meta" or not any(t.kind == "hadamard" for t in linear.spec.inputs):
        return None
    _, states = linear.spec.split(linear.packed)
    key = [linear.device, linear.in_features]
    for transform, state in zip(linear.spec.transforms, states):
        if transform.side == "in":
            contents = (t.detach().cpu().contiguous().view(torch.uint8) for t in state.values())
            key += [transform, *(t.numpy().tobytes() for t in contents)]
    return tuple(key)


def _stacked(biases: list[Tensor | None], rows: list[int]) -> Tensor | None:
    known = next((bias for bias in biases if bias is not None), None)
    if known is None:
        return None
    return torch.cat([known.new_zeros(n) if b is None else b for b, n in zip(biases, rows)])
