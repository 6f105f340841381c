"""Linears that read the same tensor (q, k, v; gate, up), multiplied together at the first call.

A model calls them one by one with one and the same tensor. The first call computes all products:
with kept weights one product with the stacked matrix, otherwise one operator that transforms the
input once. The other calls take what is theirs. The demo model has 7 linears a layer and 4 inputs;
decoding one token on two CPU cores takes 1.03 of the original's time so, 1.10 to 1.12 without it.

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
from vqllm_kernels import dispatch

if TYPE_CHECKING:
    from vqllm.runtime.linear import VQLinear


class _Ahead:
    """Products of one input that were not asked for yet, by the places of the members."""

    __slots__ = ("mode", "outputs", "version", "x")

    def __init__(self, x: Tensor, outputs: dict[int, Tensor]) -> None:
        self.x, self.version, self.mode, self.outputs = x, _version(x), _mode(), outputs

    def is_of(self, x: Tensor) -> bool:
        return self.x is x and self.version == _version(x) and self.mode == _mode()


def _version(x: Tensor) -> int:
    # A graph has no versions: who writes into x there makes a new tensor of it.
    return 0 if torch.compiler.is_compiling() else version(x)


def _mode() -> tuple[bool, bool]:
    inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return torch.is_grad_enabled(), inference


class InputGroup:
    """Two or more linears whose input, and what is done to it before the product, is the same."""

    def __init__(self, members: Sequence["VQLinear"]) -> None:
        self._members = [weakref.ref(member) for member in members]
        self._rows = [member.out_features for member in members]
        self._may_look_up = any(
            dispatch.beats_kept_weights(member.spec, torch.device("cpu"), 1) for member in members
        )
        self._place = {id(member): place for place, member in enumerate(members)}
        self._stacked: Tensor | None = None
        self._decoded_from: Fingerprint | None = None
        self._agreed: Fingerprint | None = None
        self._ahead: _Ahead | None = None
        self._is_trusted = True
        self._seen: tuple[weakref.ref[Tensor] | None, set[int]] = (None, set())

    @property
    def members(self) -> list["VQLinear"]:
        """Those that are still there."""
        found = [ref() for ref in self._members]
        return [member for member in found if member is not None]

    def output(self, member: "VQLinear", x: Tensor) -> Tensor | None:
        """The product of one member, or None: then it goes alone."""
        place = self._place.get(id(member))
        if place is None:  # a copy of a member, with the group of the original
            return None
        ahead = self._ahead
        if ahead is not None:
            y = ahead.outputs.pop(place, None) if ahead.is_of(x) else None
            if y is not None:
                if not ahead.outputs:
                    self._ahead = None
                return y
            self._ahead, self._is_trusted = None, False
        if not self._is_trusted:
            self._watch(place, x)
            return None
        outputs = self._products(x)
        if outputs is None:
            return None
        y = outputs.pop(place)
        self._ahead = _Ahead(x, outputs)
        return y

    def forget(self) -> None:
        """Drop the stacked weights and what was computed ahead; members drop their parts."""
        self._stacked = self._decoded_from = self._ahead = None

    def _drop_weights(self, members: list["VQLinear"]) -> None:
        if self._stacked is not None and not torch.compiler.is_compiling():
            self._stacked = self._decoded_from = None
            for member in members:
                member.forget()

    def _watch(self, place: int, x: Tensor) -> None:
        """Trust again once all members were called with one tensor."""
        last, places = self._seen
        places = {*places, place} if last is not None and last() is x else {place}
        self._is_trusted = len(places) == len(self._members)
        self._seen = (None, set()) if self._is_trusted else (weakref.ref(x), places)

    def _products(self, x: Tensor) -> dict[int, Tensor] | None:
        members = self.members
        if len(members) < len(self._members):  # one has left the model
            return None
        if self._may_look_up:
            num_rows = x.numel() // x.shape[-1]
            if any(member.is_faster_packed(x.device, num_rows) for member in members):
                return None
        biases = [None if m.bias is None else m.bias.to(x.dtype) for m in members]
        W_RC = None
        if cache.keeps_weights(x.device) and not any(m.is_offloaded() for m in members):
            W_RC = self._weights(members, x.dtype)
        if W_RC is None:
            self._drop_weights(members)
            if not self._inputs_agree(members):
                return None
            packed = [member.packed for member in members]
            parts = dispatch.linears(x, packed, [member.spec for member in members], biases)
        else:
            y = F.linear(x, W_RC, _stacked(biases, self._rows))
            parts = y.split_with_sizes(self._rows, -1)
        if torch.is_grad_enabled():  # several results of one product could not be written into
            parts = [part.clone(memory_format=torch.contiguous_format) for part in parts]
        elif x.numel() > x.shape[-1]:  # of a single row they are contiguous, as linears' are
            parts = [part.contiguous() for part in parts]
        return dict(enumerate(parts))

    def _inputs_agree(self, members: list["VQLinear"]) -> bool:
        """Whether the transforms of the input are still equal: they are applied once for all."""
        if torch.compiler.is_compiling():
            return True
        if self._agreed is None or not self._agreed.holds():
            if len({input_key(member) for member in members}) > 1:
                return False
            self._agreed = Fingerprint(members)
        return True

    def _weights(self, members: list["VQLinear"], dtype: torch.dtype) -> Tensor | None:
        """The decoded weights of all members, one below the other; each member keeps its part."""
        kept, origin = self._stacked, self._decoded_from
        if torch.compiler.is_compiling():
            # As with a single linear: a graph takes what an earlier call decoded.
            return kept if kept is not None and kept.dtype == dtype else None
        if kept is not None and kept.dtype == dtype and origin is not None and origin.holds():
            return kept
        with torch.inference_mode(False), torch.no_grad():
            shape = sum(self._rows), members[0].in_features
            stacked = torch.empty(shape, dtype=dtype, device=members[0].device)
            for member, part in zip(members, stacked.split(self._rows)):
                part.copy_(member.dequantize(dtype))
                member.keep(part)
        self._stacked, self._decoded_from = stacked, Fingerprint(members)
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
