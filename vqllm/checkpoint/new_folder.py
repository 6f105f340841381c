"""A folder of a model that appears whole, or not at all, and its tensors in files of some size."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from vqllm.checkpoint import atomic
from vqllm.errors import CheckpointError, OutOfSpaceError

MAX_SHARD_BYTES = 1 << 30
"""Bounds the memory of the conversion: one shard is held at a time."""


@dataclass(frozen=True)
class Made:
    """Tensors of the result that are made together."""

    sizes: Mapping[str, int]
    """their bytes, by name"""
    make: Callable[[], dict[str, Tensor]]


@contextmanager
def new_folder(output: Path, size: int, what: str) -> Iterator[Path]:
    """An empty folder that becomes `output` at the end.

    Args:
        size: bytes that will be written there.
        what: it is, for the message of a full disk.

    Raises:
        CheckpointError: `output` is in use.
        OutOfSpaceError: the disk is full, or will be with these bytes.
    """
    if atomic.names_in(output):
        raise CheckpointError(
            f"{output} is not empty; the output must be a new or an empty folder."
        )
    atomic.check_space(output, size)
    try:
        with _folder_beside(output.absolute()) as partial:
            yield partial
            _publish(partial, output)
    except OutOfSpaceError as error:
        raise OutOfSpaceError(
            f"no space left for {output}: the {what} has {size / 1e6:.1f} MB. "
            "Nothing was left there. Free some space or choose another output folder."
        ) from error
    atomic.sync_folder(output.absolute().parent)


def split(made: Sequence[Made]) -> Iterator[list[Made]]:
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


def num_bytes(made: Sequence[Made]) -> int:
    """Bytes of all tensors."""
    return sum(size for own in made for size in own.sizes.values())


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
