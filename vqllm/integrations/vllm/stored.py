"""What vLLM's loader brings for a module, kept until the module is complete.

vLLM wants a parameter for every name in the files and calls its `weight_loader`. Parts of a fused
module come under one name. Which part it is stands in an attribute of the tensor (vLLM 0.32), or is
the third argument (older ones). Parts differ in codec, number and length of their tensors, so
nothing is copied into a parameter: there is an empty one for each name, and what comes is kept.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vqllm.checkpoint.shards import DAMAGED
from vqllm.errors import CheckpointError
from vqllm_kernels import layout
from vqllm_kernels.linear import LinearSpec

WEIGHT = "weight"
QKV = {"q": 0, "k": 1, "v": 2}

Tensors = dict[str, Tensor]


class Stored:
    """The tensors of the parts of one module."""

    def __init__(self, specs: Mapping[Any, LinearSpec | None]) -> None:
        """
        Args:
            specs: of every part, by what names it; None for a dense one.
        """
        self.specs = specs
        self.tensors: dict[Any, Tensors] = {part: {} for part in specs}

    def names(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Names of all tensors, and the dtypes in which they are stored: vLLM warns of others.

        Args:
            dtype: that of dense weights.
        """
        found: dict[str, torch.dtype] = {}
        for spec in self.specs.values():
            if spec is None:
                found.setdefault(WEIGHT, dtype)
            else:
                for name, tensor in spec.layout().items():
                    found.setdefault(name, tensor.dtype)
        return found

    def keep(self, part: Hashable, name: str, tensor: Tensor) -> None:
        """Keep a copy: what comes may be a view of a file."""
        if part not in self.tensors:
            raise CheckpointError(f"part {part!r} of {list(self.tensors)} does not exist")
        self.tensors[part][name] = tensor.detach().clone()

    def complete(self, names: Mapping[Any, str]) -> list[Tensors]:
        """The tensors of each part.

        Args:
            names: of the parts, for messages.

        Raises:
            CheckpointError: some are missing or cannot be decoded.
        """
        for part, own in self.tensors.items():
            spec, name = self.specs[part], names[part]
            try:
                if spec is not None:
                    layout.check(own, spec.layout(), name)
                elif set(own) != {WEIGHT}:
                    raise ValueError(f"{name}: found tensors {sorted(own)}, expected {WEIGHT}")
            except ValueError as error:
                raise CheckpointError(f"{error}. {DAMAGED}") from error
            if spec is not None and (problem := spec.problem(own)):
                raise CheckpointError(f"{name}: {problem}. {DAMAGED}")
        return list(self.tensors.values())


def place_holders(
    layer: nn.Module,
    names: Mapping[str, torch.dtype],
    loader: Callable[..., Any],
    prefix: str = "",
) -> list[str]:
    """Give a module an empty parameter for every tensor.

    Args:
        loader: called with the name of the tensor, without `prefix`, and whatever vLLM gives it.

    Returns:
        The names of the parameters.
    """
    for name, dtype in names.items():
        parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        parameter.weight_loader = _loader_of(name, loader)  # type: ignore[attr-defined]
        layer.register_parameter(prefix + name, parameter)
    return [prefix + name for name in names]


def _loader_of(name: str, loader: Callable[..., Any]) -> Callable[..., Any]:
    def load(param: nn.Parameter, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        return loader(name, loaded_weight, *args, **kwargs)

    return load


def loader_into(stored: Stored, first: Callable[[], None]) -> Callable[..., None]:
    """The loader of a linear, fused or not.

    Args:
        first: called before anything is kept.
    """

    def load(name: str, tensor: Tensor, shard_id: Any = None) -> None:
        first()
        if shard_id is None:
            shard_id = getattr(tensor, "shard_id", None)
        stored.keep(part_of(shard_id, list(stored.specs)), name, tensor)

    return load


def wait_for(
    layer: Any,
    specs: Sequence[LinearSpec | None],
    dtype: torch.dtype,
    first: Callable[[], None],
) -> None:
    """Prepare a module of these parts for what the loader brings.

    Args:
        dtype: of dense weights and activations.
        first: called before anything is kept.
    """
    layer.vqllm_dtype, layer.vqllm_device = dtype, torch.empty(0).device
    layer.vqllm_stored = stored = Stored(dict(enumerate(specs)))
    loader = loader_into(stored, first)
    layer.vqllm_parameters = place_holders(layer, stored.names(dtype), loader)


def take(layer: Any, names: Sequence[str]) -> list[Tensors] | None:
    """The tensors of each part of a module, where it is run; None if they were taken before.

    Args:
        names: of the parts, for messages.

    Raises:
        CheckpointError: some are missing or cannot be decoded.
    """
    if not hasattr(layer, "vqllm_stored"):
        return None
    parts = layer.vqllm_stored.complete(dict(enumerate(names)))
    forget(layer)
    device = layer.vqllm_device
    return [{name: tensor.to(device) for name, tensor in own.items()} for own in parts]


def forget(layer: Any) -> None:
    """Undo `wait_for`, when all has come or nothing will."""
    for name in layer.vqllm_parameters:
        delattr(layer, name)
    del layer.vqllm_stored, layer.vqllm_parameters


@contextmanager
def default_float32() -> Iterator[None]:
    """While vLLM loads, torch's default is the dtype of the model. Weights are decoded, and factors
    of products computed, in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def part_of(shard_id: Any, parts: Sequence[Hashable]) -> Hashable:
    """The number of the part that vLLM's name of a shard stands for."""
    if shard_id is None:
        return parts[0]
    if isinstance(shard_id, tuple) and len(shard_id) == 1:
        [shard_id] = shard_id
    return QKV.get(shard_id, shard_id) if isinstance(shard_id, str) else shard_id
