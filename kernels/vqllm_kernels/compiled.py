"""numba's compilers, with what they made kept on disk where there is a place for it.

numba keeps machine code beside the source, or in the user's cache where that cannot be written, or
in NUMBA_CACHE_DIR. Without any of them it refuses to compile at all; here it then compiles anew in
every process, which is said once.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba import extending, types

logger = logging.getLogger(__name__)

intrinsic: Any = extending.intrinsic
"""numba's, whose type does not tell what it makes of a function."""
ENTRY = types.void(types.CPointer(types.int64))
"""A C function of the address of some int64."""


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` without the interpreter's lock, kept on disk."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(nogil=True, cache=True, **options)(_stamped(function))
        except RuntimeError:  # no place for a cache
            _say_once()
            return numba.njit(nogil=True, **options)(function)

    return decorate


def entry(function: Callable[[Any], None]) -> int:
    """The address of a C function of the address of some int64, compiled now."""
    try:
        return _address(numba.cfunc(ENTRY, cache=True)(_stamped(function)))
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        _say_once()
        return _address(numba.cfunc(ENTRY)(function))


def _address(compiled: Any) -> int:
    return compiled.address


def _stamped(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under a name on disk that changes with the source of any of the kernels.

    numba compares the file of a function, but not those of the functions that it calls.
    """
    function.__qualname__ = f"{function.__qualname__}_{_stamp()}"
    return function


@cache
def _stamp() -> str:
    folder = Path(__file__).parent
    files = [Path(__file__), *sorted((folder / "cpu").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


LONG = 2.0
"""Seconds of waiting for the compiler that are worth a word."""


@contextmanager
def said_if_long() -> Iterator[None]:
    """Say how long kernels were compiled inside the context, if that was long."""
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    if seconds > LONG:
        logger.warning(
            "compiled kernels for this processor in %.1f s; they are kept on disk", seconds
        )


@cache
def _say_once() -> None:
    logger.warning(
        "compiled kernels are not kept on disk, every process compiles them again: set "
        "NUMBA_CACHE_DIR to a folder that can be written"
    )
