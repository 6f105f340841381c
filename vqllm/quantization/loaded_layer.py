"""A decoder layer in memory, and what of it is quantized and trained."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """Where a module has a parameter."""

    module: nn.Module
    key: str

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.get_parameter(self.key)


def vectors_of(
    layer: nn.Module, name: str, shared: Collection[nn.Module], is_stored: Callable[[str], bool]
) -> dict[str, Place]:
    """The norms and biases of a layer by full name: those that it has alone and that the source
    stores under the names that the model uses."""
    return {
        f"{prefix}.{key}": Place(module, key)
        for prefix, module in layer.named_modules(prefix=name)
        if module not in shared
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 1 and parameter.is_floating_point() and is_stored(f"{prefix}.{key}")
    }


@dataclass(frozen=True)
class LoadedLayer:
    """A decoder layer in memory, in the compute dtype. All names are full names."""

    index: int
    name: str
    module: nn.Module
    linears: Mapping[str, nn.Linear]
    """those that are quantized"""
    weights: dict[str, Tensor]
    """theirs, as the source stores them, until they are quantized"""
    moving: Mapping[str, Place]
    """norms and biases that the recipe trains"""
    vectors: Mapping[str, Tensor]
    """theirs, as the source stores them"""


def install(module: nn.Module, key: str, values: Tensor) -> None:
    """Let a layer run with what a reader will decode."""
    parameter = module.get_parameter(key)
    parameter.data = values.to(parameter.device, parameter.dtype)
