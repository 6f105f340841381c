"""The tensors of an ordinary checkpoint folder, read one by one from its safetensors files."""

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vqllm.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class SourceTensors:
    """Tensors of a model folder by the name that they have in the model.

    Some checkpoints leave out the prefix of the base model ("model.", "transformer."); names are
    completed here, so that everything written carries full names.
    """

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.folder = folder
        known = set(model.state_dict())
        prefix = getattr(model, "base_model_prefix", "")
        self._files: dict[str, tuple[Path, str]] = {}
        for key, path in _weight_map(folder).items():
            full = f"{prefix}.{key}"
            self._files[full if key not in known and full in known else key] = (path, key)

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

    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(_size(path, keys) for path, keys in self._by_file().items())

    def _by_file(self) -> dict[Path, list[str]]:
        files: dict[Path, list[str]] = {}
        for path, key in self._files.values():
            files.setdefault(path, []).append(key)
        return files


def _weight_map(folder: Path) -> dict[str, Path]:
    index = folder / INDEX
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {key: folder / name for key, name in names.items()}
    single = folder / SINGLE
    if not single.is_file():
        raise ModelError(
            f"{folder} holds no {SINGLE} and no {INDEX}. Weights must be safetensors files: "
            "convert the model once with save_pretrained."
        )
    try:
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{single} cannot be read: {error} Get an undamaged copy.") from error


def _size(path: Path, keys: list[str]) -> int:
    total = 0
    with safe_open(path, "pt") as file:
        for key in keys:
            piece = file.get_slice(key)
            numel = 1
            for length in piece.get_shape():
                numel *= length
            total += numel * _DTYPE_BYTES[piece.get_dtype()]
    return total


_DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
