"""What modules with a packed matrix have in common: its tensors, and how they move and are kept."""

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Self

import torch
from torch import Tensor, nn

from vqllm.runtime import cache
from vqllm_kernels import layout
from vqllm_kernels.linear import LinearSpec


class Fingerprint:
    """The packed tensors that something was computed from: tells whether one of them was replaced
    or overwritten since.

    Addresses tell data that was exchanged under a parameter, which leaves its version as it is. It
    is asked at every call and pays for every tensor that has left the processor's cache: 1.4 ms a
    token for the 1680 of the demo model.
    """

    __slots__ = ("_addresses", "_counted", "_found", "_tensors", "_versions")

    def __init__(self, modules: Sequence["PackedModule"]) -> None:
        self._found = []
        self._tensors: list[Tensor] = []
        for module in modules:
            held = module._parameters.values()
            self._found.append((held, list(map(id, held))))
            self._tensors += module.packed.values()
        self._counted = [t for t in self._tensors if not t.is_inference()]
        self._addresses = list(map(_ADDRESS, self._tensors))
        self._versions = list(map(_VERSION, self._counted))

    def holds(self) -> bool:
        """Whether the tensors are what they were."""
        for held, ids in self._found:
            if list(map(id, held)) != ids:
                return False
        return (
            list(map(_ADDRESS, self._tensors)) == self._addresses
            and list(map(_VERSION, self._counted)) == self._versions
        )


_ADDRESS = Tensor.data_ptr
_VERSION = attrgetter("_version")


class PackedModule(nn.Module):
    """A matrix [rows, cols] packed as `spec` says.

    The packed tensors are parameters (accelerate moves parameters when it offloads, buffers stay
    behind) under the names of `spec.layout()`, and need no gradient. Their dtypes belong to the
    format: `.to(dtype)`, `.half()` and the like leave them alone.
    """

    def __init__(
        self, spec: LinearSpec, dtype: torch.dtype, device: torch.device | str = "meta"
    ) -> None:
        """Empty tensors.

        Args:
            spec: what is packed, and how.
            dtype: that of the weight, to code that asks.
            device: where the tensors are made; "meta" waits for a loader to fill them.
        """
        super().__init__()
        self.spec = spec
        self._dtype = dtype
        for name, tensor in spec.layout().items():
            self.register_parameter(
                name, frozen(torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
            )
        self._packed_names = list(spec.layout())
        self._dense: Tensor | None = None
        self._decoded_from: Fingerprint | None = None

    def fill(self, tensors: Mapping[str, Tensor]) -> Self:
        """Take these tensors as the packed ones.

        ValueError if they are not those of `spec`, or if their values cannot be decoded.
        """
        layout.check(dict(tensors), self.spec.layout(), "packed tensors")
        if problem := self.spec.problem(dict(tensors)):
            raise ValueError(f"packed tensors: {problem}")
        for name, tensor in tensors.items():
            self.register_parameter(name, frozen(tensor))
        return self

    def tie(self, other: "PackedModule") -> None:
        """Use the packed tensors of another module of the same specification, not a copy."""
        for name in self._packed_names:
            self.register_parameter(name, getattr(other, name))

    @property
    def weight(self) -> Tensor:
        """A stand-in on the meta device, for model code that asks for shape or dtype."""
        return torch.empty(self.spec.rows, self.spec.cols, dtype=self._dtype, device="meta")

    @property
    def packed(self) -> dict[str, Tensor]:
        """The packed tensors by name."""
        return {name: getattr(self, name) for name in self._packed_names}

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weights [rows, cols] in the model's own basis.

        Args:
            dtype: what they are rounded to, once, from float32; None is the dtype of the model.
        """
        return self.spec.dequantize(self.packed, dtype or self._dtype)

    def is_offloaded(self) -> bool:
        """Whether accelerate moves the tensors in and out at every call."""
        hook = self.__dict__.get("_hf_hook")
        if hook is None:
            return False
        return any(getattr(h, "offload", False) for h in getattr(hook, "hooks", (hook,)))

    @property
    def device(self) -> torch.device:
        """Where the packed tensors are; "meta" while they are offloaded."""
        first = self._parameters[self._packed_names[0]]
        assert first is not None, "every packed tensor is there"
        return first.device

    def keeps_weights(self) -> bool:
        """Whether the decoded weights are kept from one call to the next."""
        return cache.keeps_weights(self.device) and not self.is_offloaded()

    def _kept_weights(self, dtype: torch.dtype) -> Tensor | None:
        if torch.compiler.is_compiling():
            # A graph takes what an earlier call decoded; keeping something new would break it.
            return self._dense if self._dense is not None and self._dense.dtype == dtype else None
        if not self.keeps_weights():
            self.forget()
            return None
        dense, origin = self._dense, self._decoded_from
        if dense is None or dense.dtype != dtype or origin is None or not origin.holds():
            # What is decoded in inference mode could never be used with gradients.
            with torch.inference_mode(False), torch.no_grad():
                dense = self.dequantize(dtype)
            self.keep(dense)
        return dense

    def keep(self, dense: Tensor) -> None:
        """Take these as the decoded weights for as long as the packed tensors are what they are."""
        cache.tell_once(dense.dtype)
        self._dense, self._decoded_from = dense, Fingerprint([self])

    def forget(self) -> None:
        """Drop the decoded weights."""
        self._dense = self._decoded_from = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        packed = {id(tensor) for tensor in self.packed.values()}

        def keep_dtype(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            if id(tensor) in packed and changed.dtype != tensor.dtype:
                return tensor.to(changed.device)
            return changed

        super()._apply(keep_dtype, recurse)
        self.forget()
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dense": None, "_decoded_from": None}


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that needs no gradient."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def version(tensor: Tensor) -> int:
    """A number that grows with every change in place; always 0 for tensors of inference mode."""
    return 0 if tensor.is_inference() else tensor._version
