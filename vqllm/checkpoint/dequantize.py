"""A quantized checkpoint written back as an ordinary Hugging Face folder."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

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
    # Written to a folder beside the output, whose renaming at the end makes it appear complete.
    partial = _new_folder_beside(output.absolute())
    staging = partial / ".staging"
    staging.mkdir()
    try:
        _write(made, partial, staging, checkpoint.config)
        # The configuration is that of the source, with the new dtype under the keys that it uses.
        config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
        config = without_places(config)
        dtype_keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        config |= dict.fromkeys(dtype_keys, name)
        copy_files(checkpoint.folder, partial, staging, trust_remote_code=True)
        write_json(partial / CONFIG, config, staging)
        staging.rmdir()
        partial.replace(output)
    except OutOfSpaceError as error:
        raise OutOfSpaceError(
            f"no space left for {output}: the dense model has {_num_bytes(made) / 1e6:.1f} MB. "
            "Nothing was left there. Free some space or choose another output folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    atomic.sync_folder(output.absolute().parent)
    return output


def _new_folder_beside(output: Path) -> Path:
    """An empty folder on the same disk under a name of its own, with the mode of any new folder."""
    atomic.make_folder(output.parent)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name[:64]}.", dir=output.parent))
    probe = partial / "mode"
    probe.mkdir()
    partial.chmod(probe.stat().st_mode)
    probe.rmdir()
    return partial


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
