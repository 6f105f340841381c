"""The tensors of an ordinary checkpoint folder, read one by one from its safetensors files."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vqllm.checkpoint.shards import StoredTensor, read_header
from vqllm.errors import CheckpointError, ModelError
from vqllm.hf.loading import listed

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class SourceTensors:
    """Tensors of a model folder by the name that they have in the model.

    Some checkpoints leave out the prefix of the base model ("model.", "transformer."). Names are
    completed here, so that all written tensors have full names.
    """

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.folder = folder
        known = set(model.state_dict())
        prefix = getattr(model, "base_model_prefix", "")
        stored, files = stored_tensors(folder), weight_map(folder)
        self._files: dict[str, tuple[Path, str]] = {}
        self._bytes: dict[str, int] = {}
        for key, path in files.items():
            full = f"{prefix}.{key}"
            name = full if key not in known and full in known else key
            self._files[name] = (path, key)
            self._bytes[name] = stored[key].num_bytes

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def read(self, name: str) -> Tensor:
        """One tensor as stored. ModelError when the file is damaged."""
        path, key = self._files[name]
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read: {error} Get an undamaged copy.") from error

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a matrix as stored. ModelError when the file is damaged."""
        path, key = self._files[name]
        try:
            with safe_open(path, "pt") as file:
                return file.get_slice(key)[start:stop]
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read: {error} Get an undamaged copy.") from error

    def num_bytes(self, names: Iterable[str] | None = None) -> int:
        """Bytes of these tensors, or of all; names that are not here count nothing."""
        return sum(self._bytes.get(name, 0) for name in (self._bytes if names is None else names))


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
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        right = isinstance(names, dict) and all(map(_is_file_name, names.values()))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index} is damaged: {error!r}. Get an undamaged copy.") from error
    if not right:
        raise ModelError(
            f"{index} is damaged: its weight_map must give each tensor the name of a file in this "
            "folder. Get an undamaged copy."
        )
    missing = sorted({name for name in names.values() if not (folder / name).is_file()})
    if missing or not names:
        raise ModelError(
            f"{folder} is incomplete: its index names {len(set(names.values()))} weight files, "
            f"missing: {listed(missing) or 'all'}. Fetch the model again."
        )
    return {key: folder / name for key, name in names.items()}


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
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error} Get an undamaged copy.") from error
