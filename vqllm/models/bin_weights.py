"""Weights as pickles (`pytorch_model.bin`), converted to safetensors once, into the cache.

A pickle can execute code when it is loaded. `torch.load(weights_only=True)` builds tensors and
nothing else, and refuses the rest; what it reads is still somebody's program, so a user has to ask
for it. A file that was converted once is found by its sha256 and is not loaded again.
"""

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vqllm.checkpoint.format import CONFIG, shard_name
from vqllm.checkpoint.side_files import copied_files
from vqllm.checkpoint.writer import write_json
from vqllm.core import json_text
from vqllm.errors import ModelError
from vqllm.models.cache import build_once, cache_dir, check_room

logger = logging.getLogger(__name__)

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FLAG = "--allow-bin (in Python: allow_bin=True)"
CONVERSION = 1
"""Part of the cache key: a change in what a conversion writes gets a new number."""


def files_of(folder: Path) -> list[Path]:
    """The pickles of a model folder, as transformers takes them: the single file, or those of the
    index. Empty if there are none.

    Raises:
        ModelError: the index is damaged or names files that are not there.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        return []
    try:
        names = sorted(set(json_text.read(index)["weight_map"].values()))
        paths = [folder / name for name in names if Path(name).name == name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is damaged: {error!r}. Get an undamaged copy.") from error
    if not names or len(paths) != len(names) or not all(path.is_file() for path in paths):
        raise ModelError(
            f"{folder} is incomplete: {INDEX} names files that are not there. Fetch the model "
            "again."
        )
    return paths


def convert(folder: Path, allow: bool) -> Path:
    """The folder with the same model in safetensors.

    Args:
        folder: has pickles (`files_of`) and no safetensors.
        allow: whether they may be loaded, if they were not converted before.

    Raises:
        ModelError: they may not, or hold something else than tensors.
        OutOfSpaceError: no room in the cache.
    """
    files = files_of(folder)
    place = cache_dir() / "bin"
    if not allow and not place.is_dir():
        raise _not_allowed(folder)
    digest = hashlib.sha256()
    for file in [*files, folder / CONFIG, *(folder / own for own in copied_files(folder, True))]:
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    target = place / f"{digest.hexdigest()}-{CONVERSION}"
    if not allow and not target.is_dir():
        raise _not_allowed(folder)
    return build_once(target, lambda made: _write(folder, files, made))


def _not_allowed(folder: Path) -> ModelError:
    return ModelError(
        f"{folder} has its weights as pickles, which can execute code and are not read. To load "
        f"them as tensors and nothing else, and convert them to safetensors once, add {FLAG}. Or "
        "load them with transformers in a place you trust and `save_pretrained` once."
    )


def _write(folder: Path, files: list[Path], made: Path) -> None:
    needed = sum(file.stat().st_size for file in files)
    check_room(made, needed, f"the weights of {folder} as safetensors")
    logger.info("converting the pickles of %s to safetensors in %s", folder, made.parent)
    weight_map: dict[str, str] = {}
    total = 0
    for number, file in enumerate(files, 1):
        tensors = _tensors(file)
        if double := weight_map.keys() & tensors.keys():
            raise ModelError(f"{folder}: {min(double)} stands in two of the files.")
        shard = shard_name(number, len(files))
        save_file(tensors, made / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_json(
        made / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
        made,
    )
    for relative in [Path(CONFIG), *copied_files(folder, True)]:
        if (folder / relative).is_file():
            (made / relative).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / relative, made / relative)


def _tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickle by name, none of which share memory. ModelError for anything else."""
    try:
        values = _load(file)
    except Exception as error:  # of the pickle, the archive, or a tensor that does not fit
        first = str(error).strip().splitlines()[:1]
        raise ModelError(
            f"{file} cannot be loaded as tensors and nothing else ({type(error).__name__}: "
            f"{''.join(first)[:300]}). It is damaged, or holds code, which is not executed."
        ) from error
    if not isinstance(values, dict) or not values:
        raise ModelError(f"{file} holds no tensors by name but {type(values).__name__}.")
    tensors = {}
    for name, tensor in values.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ModelError(
                f"{file} holds {type(tensor).__name__} under the name {str(name)[:100]!r}: weights "
                "are tensors by name. Save the model's state_dict() alone."
            )
        # Views may claim any size of a small storage.
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ModelError(
                f"{file}: {name[:100]} of {tuple(tensor.shape)} is no plain tensor. Save the "
                "model with save_pretrained."
            )
        tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensors


def _load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the form of torch before 1.6 cannot be mapped
        return torch.load(file, map_location="cpu", weights_only=True)
