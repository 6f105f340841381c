"""The threads of torch's own pool: a second pool beside it would fight with it for the cores.

torch brings an OpenMP library, whose `GOMP_parallel` runs a C function on all threads of a team.
GCC's has it, and LLVM's offers it too. Where torch has none (or has another pool), kernels run on
the thread that calls them.
"""

import ctypes
import logging
import os
from functools import cache

import torch

from vqllm_kernels import machine_code
from vqllm_kernels.compiled import add_symbol, external, njit

logger = logging.getLogger(__name__)

_NUMBER, _PARALLEL = "vqllm_thread_number", "vqllm_parallel"

WORTH_WAITING = 1 << 19
"""Weights that pay for a team whose threads wait in a loop, as they do by default."""
WORTH_WAKING = 1 << 22
"""Weights that pay for one whose threads sleep (OMP_WAIT_POLICY=passive)."""

_thread_number = external(_NUMBER, "int32")
_parallel = external(_PARALLEL, "void", "intp", "intp", "uint32", "uint32")


def _one(_argument: int = 0) -> int:
    return 0


_C_NUMBER = ctypes.CFUNCTYPE(ctypes.c_int)
_C_PARALLEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


def _serial(function: int, argument: int, threads: int, flags: int) -> None:
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(argument)


# Kept alive: compiled code has their addresses.
_WITHOUT = (_C_NUMBER(_one), _C_PARALLEL(_serial))


@cache
def available() -> bool:
    """Whether torch's threads can be used. What compiled code calls is named to LLVM here, so this
    comes before any of it is compiled or loaded."""
    library = _openmp()
    if library is None:
        number, parallel = _WITHOUT
        logger.info(
            "torch has no OpenMP that offers GOMP_parallel: packed products take one thread"
        )
    else:
        number, parallel = library.omp_get_thread_num, library.GOMP_parallel
    for name, function in ((_NUMBER, number), (_PARALLEL, parallel)):
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address is not None
        add_symbol(name, address)
    return library is not None


def count() -> int:
    """Threads that a kernel takes."""
    return torch.get_num_threads() if available() else 1


@cache
def worth() -> int:
    """Weights times rows of x of a call from which on more than one thread pays."""
    waits = os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive"
    return WORTH_WAITING if waits else WORTH_WAKING


def start(function: int, argument: int, threads: int) -> None:
    """`run`, from Python."""
    available()
    _C_PARALLEL(machine_code.SYMBOLS[_PARALLEL])(function, argument, threads, 0)


@njit()
def number() -> int:
    """Of the thread that runs, in its team; 0 outside of one."""
    return _thread_number()


@njit()
def run(function: int, argument: int, threads: int) -> None:
    """function(argument) on a team of threads, by addresses; a C function that asks `number`."""
    _parallel(function, argument, threads, 0)


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch has loaded, if it offers what is needed."""
    if not torch.backends.openmp.is_available():
        return None
    for path in _loaded():
        library = ctypes.CDLL(path)
        if hasattr(library, "GOMP_parallel") and hasattr(library, "omp_get_thread_num"):
            return library
    return None


def _loaded() -> list[str]:
    """Libraries of this process that may be OpenMP's, torch's own first."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if ".so" in line}
    except OSError:
        return []
    found = [p for p in paths if any(n in p for n in ("libgomp", "libomp", "libiomp5"))]
    return sorted(found, key=lambda path: ("torch" not in path, path))
