"""Are the files of a checkpoint the ones that were written? sha256 of each against the index."""

import os
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from vqllm.checkpoint.format import INDEX
from vqllm.checkpoint.shards import DAMAGED, ShardIndex, read_index, sha256_of
from vqllm.errors import CheckpointError, VqllmError

SWITCH = "VQLLM_VERIFY"
"""Environment variable: 0 leaves checksums out when transformers loads a checkpoint.

They take .75 seconds of one core for 10⁹ bytes (Xeon with SHA instructions), several files at once.
"""


_chosen: ContextVar[bool | None] = ContextVar("_chosen", default=None)
"""by `compared`; None where nobody chose"""


@contextmanager
def compared(verify: bool) -> Iterator[None]:
    """Within, checksums are compared at load or not, whatever the environment says."""
    token = _chosen.set(verify)
    try:
        yield
    finally:
        _chosen.reset(token)


def is_wanted() -> bool:
    """Whether checksums are compared at load. VqllmError for a value that is not 0 or 1."""
    if (chosen := _chosen.get()) is not None:
        return chosen
    value = os.environ.get(SWITCH, "1")
    if value not in ("0", "1"):
        raise VqllmError(
            f"the environment variable {SWITCH} is {value!r}: 1 compares the sha256 of every file "
            "at load, 0 does not"
        )
    return value == "1"


def compare_loaded(paths: Iterable[str | Path]) -> None:
    """`compare` for the files that a loader is about to read, each with the index beside it.

    Raises:
        CheckpointError: as `compare`.
    """
    if not is_wanted():
        return
    by_folder: dict[Path, set[str]] = {}
    for path in map(Path, paths):
        by_folder.setdefault(path.parent, set()).add(path.name)
    for folder, names in by_folder.items():
        # A single file, as save_pretrained writes it, may lie beside the index of other ones.
        if (folder / INDEX).is_file():
            index = read_index(folder)
            if names & set(index.files.values()):
                compare(folder, index, names)


def compare(folder: Path, index: ShardIndex, files: Collection[str] | None = None) -> None:
    """Read all bytes of the files and compare their sha256 with those in the index.

    An index without checksums, as `save_pretrained` writes it, says nothing.

    Args:
        files: names of those that are looked at; all of the index unless given. Their headers
            were read before, so that all are there and of the size that they announce.

    Raises:
        CheckpointError: a file is not the one that was written; names the first.
    """
    if not index.checksums:
        return
    files = sorted({*index.files.values(), *index.checksums} if files is None else files)
    for name in files:
        if name not in index.checksums:
            raise CheckpointError(
                f"{folder / name} is none of the files that were written with this index, which "
                f"has the sha256 of each. {DAMAGED}"
            )
    # hashlib lets go of the interpreter's lock: two threads read twice as fast as one.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, found in zip(
            files, pool.map(sha256_of, (folder / name for name in files)), strict=True
        ):
            if found != index.checksums[name]:
                raise CheckpointError(
                    f"{folder / name} does not have the sha256 that the index records: it is "
                    f"damaged. {DAMAGED}"
                )
