"""The size of a checkpoint before it is written."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from vqllm.checkpoint.file_names import FileNames
from vqllm.checkpoint.shards import DTYPE_NAMES, StoredTensor
from vqllm.checkpoint.source import SourceTensors
from vqllm.core.bits import count
from vqllm_kernels.linear import LinearSpec

LENGTH_BYTES = 8
"""Before the header of a file, and what it is filled up to a multiple of."""

Entries = dict[str, StoredTensor]
"""The tensors of a file by name."""


@dataclass(frozen=True)
class PlannedSize:
    """Bytes of the weight files of a checkpoint."""

    tensors: int
    """exact"""
    headers: int
    """of all files; tensors that transformers merges count by their names in the model"""

    @property
    def files(self) -> int:
        return self.tensors + self.headers


def tensor_bytes(
    tensors: SourceTensors, planned: Mapping[str, LinearSpec], tied: Collection[str] = ()
) -> int:
    """Bytes of all tensors of a checkpoint.

    Args:
        tensors: of the source model.
        planned: how the linears and embeddings that will be quantized are stored, by full name.
        tied: modules that will use the tensors of another one.
    """
    packed = sum(count(spec.layout()).total for spec in planned.values()) // 8
    replaced = tensors.num_bytes(f"{name}.weight" for name in (*planned, *tied))
    return tensors.num_bytes() - replaced + packed


def planned_size(
    tensors: SourceTensors,
    layer_names: Iterable[str],
    planned: Mapping[str, LinearSpec],
    tied: Collection[str] = (),
) -> PlannedSize:
    """The size of a checkpoint with a file for each layer and one for the rest."""
    names = FileNames(tensors.blueprint, planned)
    prefixes = [f"{name}." for name in layer_names]
    shards: dict[str, Entries] = {prefix: {} for prefix in [*prefixes, ""]}
    replaced = {f"{name}.weight" for name in (*planned, *tied)}
    for name in tensors:
        if name not in replaced:
            shards[_place(name, shards)][names.of(name)] = tensors.described(name)
    for name, spec in planned.items():
        prefix, shard = names.prefix(name, spec), shards[_place(f"{name}.weight", shards)]
        for key, own in spec.layout().items():
            dtype = DTYPE_NAMES[own.dtype]
            shard[f"{prefix}.{key}"] = StoredTensor(dtype, tuple(own.shape), own.num_bytes)
    shards[""] |= tensors.described_unused()
    return PlannedSize(
        tensors=sum(own.num_bytes for shard in shards.values() for own in shard.values()),
        headers=sum(map(_header_bytes, shards.values())),
    )


def _place(name: str, shards: Mapping[str, Entries]) -> str:
    """The beginning of a tensor's name that is that of a layer, or nothing."""
    parts = name.split(".")
    beginnings = (f"{'.'.join(parts[:end])}." for end in range(1, len(parts)))
    return next((own for own in beginnings if own in shards), "")


def _header_bytes(entries: Entries) -> int:
    """Of a safetensors file with these tensors: the length, and the header filled up."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The order of the file: wide dtypes first.
    for name, own in sorted(entries.items(), key=lambda item: (-_width(item[1]), item[0])):
        begin, end = end, end + own.num_bytes
        places = [begin, end]
        header[name] = {"dtype": own.dtype, "shape": list(own.shape), "data_offsets": places}
    length = len(json.dumps(header, separators=(",", ":")))
    return LENGTH_BYTES + -(-length // LENGTH_BYTES) * LENGTH_BYTES


def _width(tensor: StoredTensor) -> int:
    return tensor.num_bytes // max(1, tensor.numel)
