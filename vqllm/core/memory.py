"""Resident memory of this process: its peak, settings so that it does not grow with layers, and
what it costs to find garbage."""

import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_M_MMAP_THRESHOLD = -3  # malloc.h of glibc
_THRESHOLD = 4 << 20


def peak_resident() -> int:
    """Largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Unlike ru_maxrss, this does not begin with the size of the process that started this one.
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available() -> int | None:
    """Bytes that the system could give without swapping; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def restart_peak() -> bool:
    """Let `peak_resident` count from here on. False where the system cannot, as outside Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # man 5 proc
    except OSError:
        return False
    return True


def keep_large_blocks_apart() -> None:
    """From now on, allocations of 4 MB and more get pages of their own, returned when they are
    freed.

    By default, glibc takes blocks of up to 32 MB from its heap. Blocks that stay in use come to lie
    between blocks that are freed, and the gaps are too small for the next ones: layers of 8 MB had
    a peak of 833 MB when there were 4 of them, and of 959 MB when there were 16. Does nothing with
    another C library.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)


@contextmanager
def old_objects_kept() -> Iterator[None]:
    """Within, or in a function that it decorates, garbage is looked for among new objects only.

    A layer that is done is freed by `gc.collect()`. Among the 400,000 objects that torch and
    transformers consist of, that takes 0.3 s.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
