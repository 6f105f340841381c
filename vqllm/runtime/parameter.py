"""Packed tensors that tell every change of theirs by one number for all of a linear, or of several.

A linear has about 8 packed tensors. To ask each of them for its address and its version at every
call took 1.6 ms a token for the 1680 of the demo model, most of it to bring them into the
processor's cache. A clock for the linears of one input: 0.16 ms.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version


def new_clock(device: torch.device) -> Tensor:
    """An empty tensor whose version counts changes of others."""
    with torch.inference_mode(False):  # tensors of inference mode have no version
        return torch.empty(0, device=device)


class PackedParameter(torch.Tensor):
    """A parameter that has the version of `clock`, as others may.

    It grows with every change in place and, unlike that of torch's parameters, when the data is
    changed through `p.data` or exchanged (`p.data = t`, `torch.utils.swap_tensors`). Not noticed is
    what is written past torch (`p.numpy()[0] = 1`) or through other tensors of the same memory that
    were there before.

    Copies share a clock where the originals do. Unpickled it is an ordinary parameter.
    `nn.Parameter(p)` is another one of the same memory and clock. torch makes it of `p.detach()`,
    which must have this type and yet be no parameter: `_is_param` tells them apart, also for
    `isinstance(p, nn.Parameter)`.
    """

    clock: Tensor
    # As that of torch's own parameters: what is computed from one is an ordinary tensor.
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    def __init__(
        self, data: Tensor, requires_grad: bool = False, clock: Tensor | None = None
    ) -> None:
        """A parameter of this data, not copied; None is a clock of its own."""

    def __new__(
        cls, data: Tensor, requires_grad: bool = False, clock: Tensor | None = None
    ) -> "PackedParameter":
        if clock is None:
            clock = new_clock(data.device)
        parameter: Any = torch.Tensor._make_subclass(cls, clock)
        parameter.clock = clock
        parameter._exchange(data)
        parameter._is_param = True
        return parameter.requires_grad_(requires_grad)

    def detach(self) -> "PackedParameter":
        """The same memory with the same version."""
        detached: Any = torch.Tensor._make_subclass(type(self), self.data)
        detached.clock = self.clock
        return detached

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The same memory with the same version; that of torch's parameters has its own."""
        return super().detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        """Other values, in the dtype that they have here, which belongs to the format: who casts
        all parameters of a model (PEFT's `prepare_model_for_kbit_training`) changes nothing."""
        self._exchange(value.to(self.dtype))

    def _exchange(self, value: Tensor) -> None:
        if value.is_inference():
            with torch.inference_mode(False):
                value = value.clone()
        _DATA.__set__(self, value)
        increment_version(self.clock)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "__class__":  # the first thing that swap_tensors does
            increment_version(self.clock)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedParameter":
        if id(self) not in memo:
            data, clock = self.data.clone(), deepcopy(self.clock, memo)
            memo[id(self)] = type(self)(data, self.requires_grad, clock)
        return memo[id(self)]

    def __reduce_ex__(self, proto: Any) -> Any:
        return nn.Parameter(self.data, self.requires_grad).__reduce_ex__(proto)


_DATA: Any = Tensor.data


class Parameters(dict[str, nn.Parameter | None]):
    """The parameters of a module by name; `clock` counts how often they were replaced."""

    clock: Tensor | None = None  # while it is unpickled

    def __init__(self, parameters: Mapping[str, nn.Parameter | None], clock: Tensor) -> None:
        super().__init__(parameters)
        self.clock = clock


def _counted(change: Callable[..., Any]) -> Callable[..., Any]:
    def counted(self: Parameters, *args: Any, **kwargs: Any) -> Any:
        if self.clock is not None:
            increment_version(self.clock)
        return change(self, *args, **kwargs)

    return counted


for _name in (
    "__delitem__",
    "__ior__",
    "__setitem__",
    "clear",
    "pop",
    "popitem",
    "setdefault",
    "update",
):
    setattr(Parameters, _name, _counted(getattr(dict, _name)))
