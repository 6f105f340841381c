"""The tensors of an ordinary checkpoint folder, read one by one from its safetensors files."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqllm.checkpoint.shards import StoredTensor, read_header
from vqllm.core import json_text
from vqllm.core.listing import listed
from vqllm.errors import CheckpointError, ModelError
from vqllm.hf.blueprint import Blueprint

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class SourceTensors:
    """Tensors of a model folder by the name that they have in the model in linear form.

    Attributes:
        folder: where they are.
        blueprint: of the model.
    """

    def __init__(self, folder: Path, blueprint: Blueprint) -> None:
        self.folder, self.blueprint = folder, blueprint
        self._stored, self._files = stored_tensors(folder), weight_map(folder)
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
        stored = stored_tensors(folder)
        return cls(folder, Blueprint.of(folder, stored, trust_remote_code))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.blueprint.origin(name) in self._origins

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(name for names in self._names.values() for name in names))

    def files_of(self, name: str) -> tuple[str, ...]:
        """Names in the files of the stored tensors that a parameter is made of."""
        return self._origins[self.blueprint.origin(name)].keys

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
        """A tensor by its name in the files, as stored. ModelError when the file is damaged."""
        return self._read(key, lambda file: file.get_tensor(key))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a matrix. ModelError when the file is damaged."""
        origin = self._origins[self.blueprint.origin(name)]
        if name in self.blueprint.parts or origin.patterns:
            return self.read(name)[start:stop]
        key = origin.keys[0]
        return self._read(key, lambda file: file.get_slice(key)[start:stop])

    def num_bytes(self, names: Iterable[str] | None = None) -> int:
        """Bytes of the stored tensors, or the share of them that these parameters have; names that
        are not here count nothing."""
        if names is None:
            return sum(tensor.num_bytes for tensor in self._stored.values())
        return sum(map(self._bytes_of, names))

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
            key = self._origins[tensor].keys[0]
            return self._read(key, lambda file: file.get_slice(key)[index])
        conversions = self.blueprint.conversions
        if conversions.merges_experts(tensor, self.blueprint.shapes[tensor][0]):
            if self._last is None or self._last[0] != (tensor, index):
                made = conversions.convert(tensor, self.read_stored, only=index)[0]
                self._last = (tensor, index), made
            return self._last[1]
        return self._whole(tensor)[index]

    def _read(self, key: str, take: Callable[[Any], Tensor]) -> Tensor:
        path = self._files[key]
        try:
            with safe_open(path, "pt") as file:
                return take(file)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read: {error} Get an undamaged copy.") from error


def _alone(part: Tensor) -> Tensor:
    """A tensor in memory of its own: a view of a larger one would keep all of that. Of Mixtral's
    gate and up, each half of one matrix, a layer took 1.9 GB more than it has."""
    own = part.contiguous()
    return own.clone() if own.untyped_storage().nbytes() > own.nbytes else own


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Dtype and shape of every tensor of a model folder, from the headers of its files.

    Raises:
        ModelError: a file is missing or damaged, or the index does not fit the files.
    """
    headers: dict[Path, dict[str, StoredTensor]] = {}
    tensors = {}
    for key, path in weight_map(folder).items():
        if path not in headers:
            headers[path] = _header(path)
        if key not in headers[path]:
            raise ModelError(
                f"{folder / INDEX} says that {key} is in {path.name}, which has no such tensor. "
                "Get an undamaged copy."
            )
        tensors[key] = headers[path][key]
    return tensors


def weight_map(folder: Path) -> dict[str, Path]:
    """The file of every tensor of a model folder.

    As in transformers, a file with the whole model goes before an index of several.

    Raises:
        ModelError: there are no such files, or the index is damaged or names files elsewhere.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return dict.fromkeys(_header(single), single)
    if not index.is_file():
        raise ModelError(
            f"{folder} holds no {SINGLE} and no {INDEX}. Weights must be safetensors files: "
            "convert the model once with save_pretrained."
        )
    # The index must be an object of file names, and all these files must be there.
    try:
        names = json_text.read(index)["weight_map"]
        right = isinstance(names, dict) and all(map(_is_file_name, names.values()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index} is damaged: {error!r}. Get an undamaged copy.") from error
    if not right:
        raise ModelError(
            f"{index} is damaged: its weight_map must give each tensor the name of a file in this "
            "folder. Get an undamaged copy."
        )
    missing = sorted(name for name in set(names.values()) if not (folder / name).is_file())
    if missing or not names:
        raise ModelError(
            f"{folder} is incomplete: its index names {len(set(names.values()))} weight files, "
            f"missing: {listed(missing) or 'all'}. Fetch the model again."
        )
    paths = {name: folder / name for name in set(names.values())}  # there are few files
    return {key: paths[name] for key, name in names.items()}


def _is_file_name(name: object) -> bool:
    """Whether it stays inside the folder, so that a model cannot have other files read."""
    return isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")


def _header(path: Path) -> dict[str, StoredTensor]:
    try:
        header = read_header(path)
        with safe_open(path, "pt"):  # compares shapes, dtypes and places, which takes no reading
            return header
    except CheckpointError as error:
        raise ModelError(str(error)) from error
    except (SafetensorError, OSError, RuntimeError) as error:  # the last where it cannot be mapped
        raise ModelError(f"{path} cannot be read: {error} Get an undamaged copy.") from error
