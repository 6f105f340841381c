"""A quantized checkpoint written back as an ordinary Hugging Face folder."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from vqllm.checkpoint import atomic
from vqllm.checkpoint.dense_tensors import Made, dense_tensors
from vqllm.checkpoint.format import CONFIG, INDEX, JSON, shard_name
from vqllm.checkpoint.reader import Checkpoint
from vqllm.checkpoint.side_files import copy_files, without_places
from vqllm.checkpoint.writer import dtype_where_missing, write_json
from vqllm.errors import CheckpointError, OutOfSpaceError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

MAX_SHARD_BYTES = 1 << 30
"""Bounds the memory of the conversion: one shard is held at a time."""


def dequantize_checkpoint(folder: str | Path, output: str | Path, dtype: str = "auto") -> Path:
    """Write the dense weights of a checkpoint as a folder that any tool reads.

    The weights are decoded in float32 and rounded once to `dtype`. Other tensors get it too if they
    have the dtype of the source model; what it stored in another one stays so. One shard is in
    memory at a time. The result appears whole, or not at all.

    Args:
        folder: a vqllm checkpoint.
        output: a new or an empty folder.
        dtype: "bfloat16", "float16", "float32", or "auto" for the dtype of the source model.

    Returns:
        `output`.

    Raises:
        CheckpointError: `folder` is no checkpoint or damaged, `output` is in use, a weight does
            not fit in float16.
        OutOfSpaceError: the disk is full.
    """
    checkpoint = Checkpoint.open(folder)
    output = Path(output)
    name = _dtype_name(dtype, checkpoint.config)
    if atomic.names_in(output):
        raise CheckpointError(
            f"{output} is not empty; the output must be a new or an empty folder."
        )
    source = DTYPES[_dtype_name("auto", checkpoint.config)]
    made = dense_tensors(checkpoint, DTYPES[name], source)
    atomic.check_space(output, _num_bytes(made))
    try:
        with _folder_beside(output.absolute()) as partial:
            _write_folder(checkpoint, made, name, partial)
            _publish(partial, output)
    except OutOfSpaceError as error:
        raise OutOfSpaceError(
            f"no space left for {output}: the dense model has {_num_bytes(made) / 1e6:.1f} MB. "
            "Nothing was left there. Free some space or choose another output folder."
        ) from error
    atomic.sync_folder(output.absolute().parent)
    return output


def _write_folder(checkpoint: Checkpoint, made: Sequence[Made], dtype: str, folder: Path) -> None:
    """Everything of the ordinary folder, into one that is empty."""
    staging = folder / ".staging"
    staging.mkdir()
    _write(made, folder, staging, checkpoint.config)
    # The configuration is that of the source, with the new dtype under the keys that it uses.
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    config = without_places(config)
    dtype_keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    config |= dict.fromkeys(dtype_keys, dtype)
    copy_files(checkpoint.folder, folder, staging, trust_remote_code=True)
    write_json(folder / CONFIG, config, staging)
    staging.rmdir()


@contextmanager
def _folder_beside(output: Path) -> Iterator[Path]:
    """An empty folder on the same disk, which one process has at a time and nothing stays of.

    Its place follows from the output's name, so that the next run removes what a killed one left.

    Raises:
        CheckpointError: it cannot be made, or another process writes the same output.
    """
    place = output.with_name(f".{output.name[:64]}.partial")
    atomic.make_folder(place)
    lock = FileLock(place / "lock")
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError) as error:  # OSError: it has just finished and taken the place away
        raise CheckpointError(
            f"another process is writing to {output}. Wait for it, stop it, or choose another "
            "output folder."
        ) from error
    try:
        shutil.rmtree(place / "folder", ignore_errors=True)
        (place / "folder").mkdir()
        yield place / "folder"
    finally:
        shutil.rmtree(place, ignore_errors=True)
        lock.release()


def _publish(partial: Path, output: Path) -> None:
    """Rename a complete folder. CheckpointError where another process came first."""
    try:
        partial.replace(output)
    except OSError as error:
        raise CheckpointError(
            f"{output} cannot be written: {error.strerror}. The output must be a new or an empty "
            "folder that nothing else writes to."
        ) from error


def _dtype_name(dtype: str, config: dict[str, object]) -> str:
    if dtype == "auto":
        source = str(config.get("dtype") or config.get("torch_dtype"))
        return source if source in DTYPES else "bfloat16"
    if dtype not in DTYPES:
        raise CheckpointError(
            f"dtype {dtype!r}; allowed are auto, {', '.join(DTYPES)}. bfloat16 holds every weight."
        )
    return dtype


def _write(made: Sequence[Made], folder: Path, staging: Path, config: JSON) -> None:
    shards = list(_split(made))
    weight_map: dict[str, str] = {}
    for number, group in enumerate(shards, start=1):
        file = shard_name(number, len(shards))
        tensors = {name: tensor for own in group for name, tensor in own.make().items()}
        atomic.write_shard(folder / file, tensors, staging)
        weight_map |= dict.fromkeys(tensors, file)
    metadata = {"total_size": _num_bytes(made), **dtype_where_missing(config)}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map}, staging)


def _split(made: Sequence[Made]) -> Iterator[list[Made]]:
    """The tensors of each shard: as many in order as fit, at least one."""
    group: list[Made] = []
    total = 0
    for own in made:
        size = sum(own.sizes.values())
        if group and total + size > MAX_SHARD_BYTES:
            yield group
            group, total = [], 0
        group.append(own)
        total += size
    yield group


def _num_bytes(made: Sequence[Made]) -> int:
    return sum(size for own in made for size in own.sizes.values())
