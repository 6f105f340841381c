"""The user's cache: things that are expensive to fetch or convert, each made once and whole."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from vqllm.errors import ModelError, OutOfSpaceError


def cache_dir() -> Path:
    """`$VQLLM_CACHE`, or `~/.cache/vqllm`. Read at each call; may not exist yet."""
    chosen = os.environ.get("VQLLM_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "vqllm"


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """The folder `target`, made by `build` if it is not there yet.

    `build` fills a folder beside `target` that is renamed when it is complete, so a killed process
    leaves nothing that looks finished. A second process waits for the first; what a killed one
    left behind is removed by the next.

    Raises:
        ModelError: the cache cannot be written.
    """
    if target.is_dir():
        return target
    # One process builds, the others wait at the lock.
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(f"{target.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise ModelError(
            f"the cache {target.parent} cannot be written: {error}. Set VQLLM_CACHE to a folder "
            "that can."
        ) from error
    # The rename makes the folder appear complete. Whoever waited finds it there.
    partial = target.with_name(f"{target.name}.partial")
    try:
        if not target.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            build(partial)
            _sync(partial)
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.release()
    return target


def _sync(folder: Path) -> None:
    """Bring the files to disk before the rename that declares them complete."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def check_room(folder: Path, num_bytes: int, what: str) -> None:
    """Raise OutOfSpaceError unless there is room for as many bytes where `build_once` builds.

    Args:
        folder: that is being built.
        what: will take them, for the message.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise OutOfSpaceError(
            f"{what} take {num_bytes / 1e9:.1f} GB, the cache {folder.parent} has "
            f"{free / 1e9:.1f} GB free. Make room, or set VQLLM_CACHE."
        )
