"""The tensors of a model folder, read one by one from its safetensors files."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from vqllm.checkpoint.shards import DTYPE_NAMES, StoredTensor
from vqllm.checkpoint.stored import StoredFolder
from vqllm.hf.blueprint import Blueprint


class SourceTensors:
    """Tensors of a model folder by the name that they have in the model in linear form.

    Attributes:
        folder: where they are.
        blueprint: of the model.
    """

    def __init__(self, stored: StoredFolder, blueprint: Blueprint) -> None:
        self.folder, self.blueprint = stored.folder, blueprint
        self._folder, self._stored = stored, stored.tensors
        self._origins = blueprint.conversions.origins
        names: dict[str, list[str]] = {}
        for name, part in blueprint.parts.items():
            names.setdefault(part.tensor, []).append(name)
        self._names = {tensor: names.get(tensor, [tensor]) for tensor in self._origins}
        """the parameters of the linear form that each tensor of transformers' own model holds"""
        self._last: tuple[str | tuple[str, int], Tensor] | None = None

    @classmethod
    def open(cls, folder: Path, trust_remote_code: bool = False) -> "SourceTensors":
        """ModelError when the folder is damaged, or transformers does not know the model."""
        stored = StoredFolder(folder)
        return cls(stored, Blueprint.of(folder, stored.tensors, trust_remote_code))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.blueprint.origin(name) in self._origins

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(name for names in self._names.values() for name in names))

    def files_of(self, name: str) -> tuple[str, ...]:
        """Names in the files of the stored tensors that a parameter is made of."""
        return self._origins[self.blueprint.origin(name)].keys

    def shape_in_files(self, key: str) -> tuple[int, ...]:
        """The shape of a stored tensor, or of the dense one where another tool coded it."""
        return self._stored[key].shape

    def is_decoded(self, name: str) -> bool:
        """Whether a parameter's stored form is one of few bits, as an original was released in."""
        return self.blueprint.conversions.is_decoded(self.blueprint.origin(name))

    def unused(self) -> list[str]:
        """Names in the files of tensors that the model has no place for."""
        return self.blueprint.conversions.unused

    def siblings(self, name: str) -> list[str]:
        """All parameters that are made of the same stored tensors as this one."""
        return self._names[self.blueprint.origin(name)]

    def read(self, name: str) -> Tensor:
        """A parameter of the model, in the dtype of its stored tensors. ModelError when a file is
        damaged."""
        part = self.blueprint.parts.get(name)
        if part is None:
            return self._whole(name)
        if part.expert is None:
            return _alone(part.of(self._whole(part.tensor)))
        one = replace(part, expert=None)
        return _alone(one.of(self._expert(part.tensor, part.expert)))

    def read_origin(self, name: str) -> Tensor:
        """The tensor of transformers' own model that holds a parameter."""
        return self._whole(self.blueprint.origin(name))

    def read_many(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Several parameters, in an order in which every stored tensor is read once."""
        for name in sorted(names, key=self.blueprint.origin):
            yield name, self.read(name)
        self._last = None

    def read_stored(self, key: str) -> Tensor:
        """A tensor by its name in the files, as stored, or decoded where another tool coded it.
        ModelError when the file is damaged."""
        return self._folder.read(key)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a matrix. ModelError when the file is damaged."""
        origin = self._origins[self.blueprint.origin(name)]
        if name in self.blueprint.parts or origin.patterns:
            return self.read(name)[start:stop]
        return self._folder.read_part(origin.keys[0], slice(start, stop))

    def num_bytes(self, names: Iterable[str] | None = None) -> int:
        """Bytes of the stored tensors, or the share of them that these parameters have; names that
        are not here count nothing."""
        if names is None:
            return sum(tensor.num_bytes for tensor in self._stored.values())
        return sum(map(self._bytes_of, names))

    def described(self, name: str) -> StoredTensor:
        """Dtype, shape and bytes of a parameter as a checkpoint has it that stores it dense."""
        origin = self._origins[self.blueprint.origin(name)]
        first = self._stored[origin.keys[0]]
        if name not in self.blueprint.parts and not origin.patterns:
            return first
        value = self.blueprint.model.get_parameter(name)
        dtype = DTYPE_NAMES.get(value.dtype, first.dtype)
        num_bytes = value.nbytes if self.is_decoded(name) else self._bytes_of(name)
        return StoredTensor(dtype, tuple(value.shape), num_bytes)

    def described_unused(self) -> dict[str, StoredTensor]:
        """The same of the tensors that the model has no place for, by name in the files."""
        return {key: self._stored[key] for key in self.unused()}

    def _bytes_of(self, name: str) -> int:
        if name not in self:
            return 0
        origin = self.blueprint.origin(name)
        stored = sum(self._stored[key].num_bytes for key in self._origins[origin].keys)
        if name not in self.blueprint.parts:
            return stored
        own = self.blueprint.model.get_parameter(name).numel()
        return stored * own // max(1, self.blueprint.shapes[origin].numel())

    def _whole(self, tensor: str) -> Tensor:
        """A tensor of transformers' own model; the last one that was converted is kept."""
        if not self._origins[tensor].patterns:
            return self.read_stored(self._origins[tensor].keys[0])
        if self._last is None or self._last[0] != tensor:
            self._last = None
            made = self.blueprint.conversions.convert(tensor, self.read_stored)
            self._last = tensor, made
        return self._last[1]

    def _expert(self, tensor: str, index: int) -> Tensor:
        """What one expert has of a tensor of transformers' own model, read alone if it can be."""
        if not self._origins[tensor].patterns:
            return self._folder.read_part(self._origins[tensor].keys[0], index)
        conversions = self.blueprint.conversions
        if conversions.merges_experts(tensor, self.blueprint.shapes[tensor][0]):
            if self._last is None or self._last[0] != (tensor, index):
                made = conversions.convert(tensor, self.read_stored, only=index)[0]
                self._last = (tensor, index), made
            return self._last[1]
        return self._whole(tensor)[index]


def _alone(part: Tensor) -> Tensor:
    """A tensor in memory of its own: a view of a larger one would keep all of that. Of Mixtral's
    gate and up, each half of one matrix, a layer took 1.9 GB more than it has."""
    own = part.contiguous()
    return own.clone() if own.untyped_storage().nbytes() > own.nbytes else own
