"""A quantized checkpoint written back as an ordinary Hugging Face folder."""

from collections.abc import Sequence
from pathlib import Path

import torch

from vqllm.checkpoint import atomic
from vqllm.checkpoint.dense_tensors import decoded_tensors, dense_tensors
from vqllm.checkpoint.format import CONFIG, INDEX, JSON, shard_name
from vqllm.checkpoint.new_folder import Made, new_folder, num_bytes, split
from vqllm.checkpoint.reader import Checkpoint
from vqllm.checkpoint.side_files import copy_files, without_places
from vqllm.checkpoint.stored import coded_folder
from vqllm.checkpoint.writer import dtype_where_missing, read_dense_config, write_json
from vqllm.errors import CheckpointError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def dequantize_checkpoint(folder: str | Path, output: str | Path, dtype: str = "auto") -> Path:
    """Write the dense weights of a checkpoint as a folder that any tool reads.

    The weights are decoded in float32 and rounded once to `dtype`. Other tensors get it too if they
    have the dtype of the source model; what it stored in another one stays so. One shard is in
    memory at a time. The result appears whole, or not at all.

    Args:
        folder: a vqllm checkpoint, or one of another tool in a format of `vqllm.foreign`.
        output: a new or an empty folder.
        dtype: "bfloat16", "float16", "float32", or "auto" for the dtype of the source model.

    Returns:
        `output`.

    Raises:
        CheckpointError: `folder` is no checkpoint or damaged, `output` is in use, a weight does
            not fit in float16.
        ModelError: the checkpoint of another tool is damaged, or has an option that is not known.
        OutOfSpaceError: the disk is full.
    """
    folder, output = Path(folder), Path(output)
    coded = coded_folder(folder)
    checkpoint = Checkpoint.open(folder) if coded is None else None
    config = read_dense_config(folder) if checkpoint is None else checkpoint.config
    config = {k: v for k, v in config.items() if k != "quantization_config"}
    name, source = _dtype_name(dtype, config), DTYPES[_dtype_name("auto", config)]
    if checkpoint is not None:
        made = dense_tensors(checkpoint, DTYPES[name], source)
    else:
        assert coded is not None
        made = decoded_tensors(coded, DTYPES[name], source)
    with new_folder(output, num_bytes(made), "dense model") as partial:
        _write_folder(folder, config, made, name, partial)
    return output


def _write_folder(
    source: Path, config: JSON, made: Sequence[Made], dtype: str, folder: Path
) -> None:
    """Everything of the ordinary folder, into one that is empty."""
    staging = folder / ".staging"
    staging.mkdir()
    _write(made, folder, staging, config)
    # The configuration is that of the source, with the new dtype under the keys that it uses.
    config = without_places(config)
    dtype_keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    config |= dict.fromkeys(dtype_keys, dtype)
    copy_files(source, folder, staging, trust_remote_code=True)
    write_json(folder / CONFIG, config, staging)
    staging.rmdir()


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
    shards = list(split(made))
    weight_map: dict[str, str] = {}
    for number, group in enumerate(shards, start=1):
        file = shard_name(number, len(shards))
        tensors = {name: tensor for own in group for name, tensor in own.make().items()}
        atomic.write_shard(folder / file, tensors, staging)
        weight_map |= dict.fromkeys(tensors, file)
    metadata = {"total_size": num_bytes(made), **dtype_where_missing(config)}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map}, staging)
