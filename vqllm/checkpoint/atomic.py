"""Files that appear whole or not at all, also when the disk is full.

A file is written under a temporary name in a staging folder of the same file system, brought to
the disk, and renamed. A process killed at any moment leaves the old file or the new one.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vqllm.checkpoint.shards import sha256_of
from vqllm.core import path_names
from vqllm.errors import CheckpointError, OutOfSpaceError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RESUME = "What is finished is kept. Free some space and run the same command again to go on."


def write_bytes(path: Path, data: bytes, staging: Path) -> None:
    """Write a file. OutOfSpaceError when the disk is full; `path` is then as it was before."""
    temporary = staging / f"{path.name}.part"
    with _out_of_space(path, len(data), temporary):
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _publish(temporary, path)


def write_shard(path: Path, tensors: dict[str, Tensor], staging: Path) -> str:
    """Write tensors as a safetensors file.

    The bytes depend on names and values only, not on the order of the mapping.

    Args:
        path: where the file appears.
        tensors: CPU tensors by name; no two may share memory.
        staging: an existing folder on the same file system.

    Returns:
        sha256 of the file, hex.

    Raises:
        OutOfSpaceError: the disk is full; `path` is then as it was before.
    """
    temporary = staging / f"{path.name}.part"
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    with _out_of_space(path, num_bytes, temporary):
        temporary.touch()
        # safetensors makes its files readable by their owner only.
        mode = temporary.stat().st_mode
        packed = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(packed, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        digest = sha256_of(temporary)
        _publish(temporary, path)
    return digest


def make_folder(folder: Path) -> None:
    """Make a folder and its parents. CheckpointError where that is not possible."""
    _check_name(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_output(folder, error) from error


def names_in(folder: Path) -> list[str]:
    """What an output folder holds, sorted; nothing if there is none.

    Raises:
        CheckpointError: it is a file, or cannot be read.
    """
    _check_name(folder)
    try:
        return sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _no_output(folder, error) from error


def _check_name(folder: Path) -> None:
    if (problem := path_names.problem(folder)) is not None:
        raise CheckpointError(
            f"{path_names.shown(folder)} cannot be an output folder: {problem}. Choose "
            "another name."
        )


def _no_output(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{folder} cannot be an output folder: {error.strerror}. Choose a new or empty folder "
        "where you may write."
    )


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise OutOfSpaceError if `num_bytes` more do not fit on the disk of `folder`."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise OutOfSpaceError(
            f"{folder} needs {_mb(num_bytes)} more, and {_mb(free)} are free on its disk. Free "
            "some space or choose another output folder."
        )


def sync_folder(folder: Path) -> None:
    """Bring renames and deletions in `folder` to the disk."""
    if os.name == "nt":
        return  # Windows has no handle of a folder to sync; NTFS journals the rename itself.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_out_of_space(error: BaseException) -> bool:
    """Whether a write failed because the disk or the quota is full."""
    if isinstance(error, OSError):
        return error.errno in NO_SPACE
    # safetensors passes the system's error on as text: "... (os error 28)".
    return any(f"os error {number})" in str(error) for number in NO_SPACE)


def out_of_space(path: Path, num_bytes: int) -> OutOfSpaceError:
    """The error for a file of `num_bytes` that could not be written."""
    free = shutil.disk_usage(path.parent).free
    return OutOfSpaceError(
        f"no space left for {path}: it has {_mb(num_bytes)}, and {_mb(free)} are free. {RESUME}"
    )


def _publish(temporary: Path, path: Path) -> None:
    temporary.replace(path)
    sync_folder(path.parent)


@contextmanager
def _out_of_space(path: Path, num_bytes: int, temporary: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        if is_out_of_space(error):
            raise out_of_space(path, num_bytes) from error
        raise


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
