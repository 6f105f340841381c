"""The safetensors files of a model folder: which there are, and which tensors are in which."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from vqllm.checkpoint.format import INDEX, SINGLE
from vqllm.checkpoint.shards import StoredTensor, read_header
from vqllm.core import json_text
from vqllm.core.listing import listed
from vqllm.errors import CheckpointError, ModelError


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


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights in the form that is read."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


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
