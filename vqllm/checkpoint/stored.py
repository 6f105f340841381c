"""The tensors of a model folder by the names and shapes that an ordinary checkpoint has.

Of an ordinary folder they are those of its files. Of a checkpoint of another tool, in a format of
`vqllm.foreign`, a coded module has one tensor, its dense weight, which is decoded when it is read.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqllm.checkpoint.format import CONFIG
from vqllm.checkpoint.shards import DTYPE_NAMES, StoredTensor
from vqllm.checkpoint.source_files import stored_tensors, weight_map
from vqllm.core import json_text
from vqllm.errors import ModelError
from vqllm.foreign import format_of
from vqllm.foreign.coded_model import CodedModel, coded_model


class StoredFolder:
    """A folder's tensors.

    Attributes:
        folder: where they are.
        tensors: dtype, shape and bytes of each by name.
        coded: what is decoded; None for an ordinary folder.
    """

    def __init__(self, folder: Path) -> None:
        """ModelError when the folder is damaged, or has an option that is not known."""
        self.folder = folder
        self._files = weight_map(folder)
        stored = stored_tensors(folder)
        self.coded = coded_model(folder, _config(folder), stored, self._whole)
        self.tensors = stored if self.coded is None else _dense(self.coded, stored)
        modules = {} if self.coded is None else self.coded.modules
        self._decoded = {f"{name}.weight": module for name, module in modules.items()}
        self._last: tuple[str, Tensor] | None = None

    def read(self, key: str) -> Tensor:
        """A tensor. ModelError when its file is damaged."""
        if self.coded is None or key not in self._decoded:
            return self._whole(key)
        return self._decoded[key].decode(self.coded.dtype)

    def read_part(self, key: str, index: int | slice) -> Tensor:
        """A part of a tensor along its first axis."""
        if key not in self._decoded:
            return self._read(key, lambda file: file.get_slice(key)[index])
        # Of a matrix that is read in blocks of rows, all are decoded with the first block.
        if self._last is None or self._last[0] != key:
            self._last = None
            self._last = key, self.read(key)
        return self._last[1][index]

    def _whole(self, key: str) -> Tensor:
        return self._read(key, lambda file: file.get_tensor(key))

    def _read(self, key: str, take: Callable[[Any], Tensor]) -> Tensor:
        path = self._files[key]
        try:
            with safe_open(path, "pt") as file:
                return take(file)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read: {error} Get an undamaged copy.") from error


def coded_folder(folder: Path) -> StoredFolder | None:
    """A checkpoint of another tool; None for any other folder. ModelError as of `StoredFolder`."""
    if format_of(_config(folder), str(folder / CONFIG)) is None:
        return None
    return StoredFolder(folder)


def tensors_to_load(folder: Path) -> "dict[str, LazyTensor] | None":
    """All tensors of a checkpoint of another tool, for transformers' loader, which decodes each
    when its turn comes; None for any other folder."""
    stored = coded_folder(folder)
    return stored and {key: LazyTensor(stored, key) for key in stored.tensors}


class LazyTensor:
    """A stored tensor that is read when transformers' loader takes it: by an index, as it does with
    safetensors' slices, or by `to`. All else is that of an empty tensor of its shape."""

    def __init__(self, stored: StoredFolder, key: str) -> None:
        self._stored, self._key = stored, key
        header = stored.tensors[key]
        dtype = next((own for own, name in DTYPE_NAMES.items() if name == header.dtype), None)
        self._empty = torch.empty(header.shape, dtype=dtype, device="meta")

    def __getitem__(self, index: Any) -> Tensor:
        return self._stored.read(self._key)[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._empty, name)

    def to(self, *args: Any, **options: Any) -> Tensor:
        return self._stored.read(self._key).to(*args, **options)


def _dense(coded: CodedModel, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    tensors = {key: tensor for key, tensor in stored.items() if key not in coded.taken}
    for name, module in coded.modules.items():
        shape = (module.shape.rows, module.shape.cols)
        num_bytes = math.prod(shape) * coded.dtype.itemsize
        tensors[f"{name}.weight"] = StoredTensor(DTYPE_NAMES[coded.dtype], shape, num_bytes)
    return tensors


def _config(folder: Path) -> dict[str, Any]:
    try:
        values = json_text.read(folder / CONFIG)
    except (OSError, ValueError):
        return {}  # whoever needs it says so
    return values if isinstance(values, dict) else {}
