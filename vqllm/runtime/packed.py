"""What modules with a packed matrix have in common: its tensors, and how they move and are kept."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from typing import Any, Self

import torch
from torch import Tensor, nn

from vqllm.core.tensors import frozen
from vqllm.runtime import cache
from vqllm.runtime.parameter import PackedParameter, Parameters, new_clock
from vqllm.runtime.weight import PackedWeight, written
from vqllm_kernels import dispatch, layout
from vqllm_kernels.linear import LinearSpec


class Fingerprint:
    """What something was decoded from and kept for: tells whether a packed tensor was replaced or
    overwritten since, or the weight cache set to something else.

    It is asked at every call, and what it looks at has left the processor's cache by then: for
    loaded modules (`own_tensors`) one clock. Of others it looks at every parameter, and at the
    address, which tells data that was exchanged, and the version of every tensor.
    """

    __slots__ = ("_clock", "_mode", "_rest", "_version")

    def __init__(self, modules: Sequence["PackedModule"]) -> None:
        clocks: dict[int, Tensor] = {}
        found: list[tuple[dict[str, nn.Parameter | None], list[nn.Parameter | None]]] = []
        alone: list[tuple[Tensor, int, int]] = []
        for module in modules:
            held = module._parameters
            if isinstance(held, Parameters) and held.clock is not None:
                clocks[id(held.clock)] = held.clock
            else:
                found.append((held, list(held.values())))
            for tensor in module.packed.values():
                if isinstance(tensor, PackedParameter):
                    clocks[id(tensor.clock)] = tensor.clock
                else:
                    alone.append((tensor, tensor.data_ptr(), version(tensor)))
        first, *more = clocks.values() if clocks else [new_clock(modules[0].device)]
        self._clock, self._version = first, first._version
        more = [(clock, clock._version) for clock in more]
        self._rest = (more, found, alone) if more or found or alone else None
        self._mode = cache.weight_cache()

    def holds(self) -> bool:
        """Whether the tensors and the setting are what they were."""
        if self._clock._version != self._version or cache.weight_cache() != self._mode:
            return False
        if self._rest is None:
            return True
        clocks, found, alone = self._rest
        return (
            all(clock._version == count for clock, count in clocks)
            and all(
                len(held) == len(before) and all(map(is_, held.values(), before))
                for held, before in found
            )
            and all(t.data_ptr() == place and version(t) == count for t, place, count in alone)
        )


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
        nn.Module.__init__(self)  # not that of nn.Linear or nn.Embedding, which makes a weight
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
        """The dense weights [rows, cols], decoded when they are used: `PackedWeight`."""
        if torch.compiler.is_compiling():  # what a graph does not use is not in it
            return dispatch.dense(self.packed, self.spec, self._dtype)
        form = torch.empty(self.spec.rows, self.spec.cols, dtype=self._dtype, device="meta")
        return PackedWeight(form, self.device, lambda: self._decoded_weights(form.dtype))

    @weight.setter
    def weight(self, value: object) -> None:
        raise written()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            raise written()
        super().register_parameter(name, param)

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
        dense, origin = self._dense, self._decoded_from
        if torch.compiler.is_compiling():
            # A graph takes what an earlier call decoded; keeping something new would break it.
            return dense if dense is not None and dense.dtype == dtype else None
        # Where the tensors are what they were, they are not offloaded either: that replaces them.
        if dense is not None and dense.dtype == dtype and origin is not None and origin.holds():
            return dense
        if not self.keeps_weights():
            self.forget()
            return None
        # What is decoded in inference mode could never be used with gradients.
        with torch.inference_mode(False), torch.no_grad():
            dense = self.dequantize(dtype)
        self.keep(dense)
        return dense

    def _decoded_weights(self, dtype: torch.dtype) -> Tensor:
        """The decoded weights for reading: those that are kept, or for this one time."""
        dense, origin = self._dense, self._decoded_from
        if dense is not None and dense.dtype == dtype and origin is not None and origin.holds():
            return dense
        with torch.inference_mode(False), torch.no_grad():
            return self.dequantize(dtype).contiguous()

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

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Ordinary tensors, which can be stored for who has only torch."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in () if keep_vars else self._packed_names:
            destination[prefix + name] = destination[prefix + name].data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dense": None, "_decoded_from": None}


def own_tensors(modules: Iterable[Sequence[PackedModule]]) -> None:
    """Let changes of the packed tensors of loaded modules be seen at one look.

    To be called where nobody else has the tensors yet: what is written into those that a loader put
    there would change the memory, but not the clock. Tied modules stay tied.

    Args:
        modules: with those of one sequence multiplied together. They get one clock, and no more
            than they, because autograd refuses tensors whose version has changed.
    """
    made: dict[nn.Parameter, Any] = {}  # parameters to isinstance, not by their class
    for together in modules:
        clock = new_clock(together[0].device)
        for module in together:
            for name in module._packed_names:
                old = getattr(module, name)
                if old not in made:
                    made[old] = PackedParameter(old.data, clock=clock)
                module.register_parameter(name, made[old])
            module._parameters = Parameters(module._parameters, clock)


def version(tensor: Tensor) -> int:
    """A number that grows with every change in place; always 0 for tensors of inference mode."""
    return 0 if tensor.is_inference() else tensor._version
