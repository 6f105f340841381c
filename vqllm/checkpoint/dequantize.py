"""A quantized checkpoint written back as an ordinary Hugging Face folder."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vqllm.checkpoint import atomic
from vqllm.checkpoint.format import CONFIG, INDEX, RECORDS, shard_name
from vqllm.checkpoint.reader import Checkpoint
from vqllm.checkpoint.shards import natural_order
from vqllm.checkpoint.writer import copy_files, write_json
from vqllm.errors import CheckpointError, OutOfSpaceError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

MAX_SHARD_BYTES = 1 << 30
"""Bounds the memory of the conversion: one shard is held at a time."""

REPORT_FILES = (RECORDS, "report.md", "proxy_loss.png")
"""Pages about the quantized checkpoint, which do not describe the dense one."""


def dequantize_checkpoint(folder: str | Path, output: str | Path, dtype: str = "auto") -> Path:
    """Write the dense weights of a checkpoint as a folder that any tool reads.

    The weights are decoded in float32 and rounded once to `dtype`. One shard is in memory at a
    time. The result appears whole, or not at all.

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
    sizes = _sizes(checkpoint, DTYPES[name])
    atomic.check_space(output, sum(sizes.values()))
    # Written to a folder beside the output, whose renaming at the end makes it appear complete.
    partial = _new_folder_beside(output.absolute())
    staging = partial / ".staging"
    staging.mkdir()
    try:
        _write(checkpoint, sizes, DTYPES[name], partial, staging)
        # The configuration is that of the source, with the new dtype under the keys that it uses.
        config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
        dtype_keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        config |= dict.fromkeys(dtype_keys, name)
        copy_files(checkpoint.folder, partial, staging, trust_remote_code=True)
        for page in REPORT_FILES:
            (partial / page).unlink(missing_ok=True)
        write_json(partial / CONFIG, config, staging)
        staging.rmdir()
        partial.replace(output)
    except OutOfSpaceError as error:
        raise OutOfSpaceError(
            f"no space left for {output}: the dense model has {sum(sizes.values()) / 1e6:.1f} MB. "
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


def _sizes(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of every tensor of the result, in the order in which they are written."""
    sizes = {
        f"{module}.weight": spec.rows * spec.cols * dtype.itemsize
        for module, spec in checkpoint.linears.items()
    }
    for name in checkpoint.other_tensors():
        stored = checkpoint.tensors[name]
        is_float = stored.dtype in ("F64", "F32", "F16", "BF16")
        sizes[name] = stored.numel * dtype.itemsize if is_float else stored.num_bytes
    return {name: sizes[name] for name in sorted(sizes, key=natural_order)}


def _write(
    checkpoint: Checkpoint, sizes: dict[str, int], dtype: torch.dtype, folder: Path, staging: Path
) -> None:
    shards = list(_split(sizes))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = shard_name(number, len(shards))
        tensors = {name: _dense_tensor(checkpoint, name, dtype) for name in names}
        atomic.write_shard(folder / file, tensors, staging)
        weight_map |= dict.fromkeys(names, file)
    metadata = {"total_size": sum(sizes.values())}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map}, staging)


def _split(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Names of the tensors of each shard: as many in order as fit, at least one."""
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > MAX_SHARD_BYTES:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def _dense_tensor(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Tensor:
    """A tensor of the result. CheckpointError where `dtype` cannot hold a finite value of it."""
    module = name.removesuffix(".weight")
    if module in checkpoint.linears:
        dense = checkpoint.dense(module, dtype)
        if bool(torch.isfinite(dense).all()):
            return dense
        # Decoded once more, in float32: the value that did not fit belongs in the message.
        stored = checkpoint.dense(module)
    else:
        stored = checkpoint.read(name)
        if not stored.is_floating_point():
            return stored
        dense = stored.to(dtype)
    if not bool(torch.isfinite(dense).all()) and bool(torch.isfinite(stored).all()):
        raise CheckpointError(
            f"{name} has values up to {float(stored.abs().max()):.4g}, beyond the range of "
            f"{dtype}. Use bfloat16."
        )
    return dense
