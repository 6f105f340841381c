"""What `machine_code` keeps, taken out of numba: imported when something was compiled."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.runtime import nrtdynmod

from vqllm_kernels import machine_code
from vqllm_kernels.compiled import put_in_place
from vqllm_kernels.cpu import memory

HEAD = 64
"""Bytes before an array: five numbers that numba reads, of 8 bytes each."""

_malloc = types.ExternalFunction("malloc", types.intp(types.intp))
_free = types.ExternalFunction("free", types.void(types.intp))


def compiled(name: str, kind: Any, function: Callable[..., Any]) -> int | None:
    """The address of a C function, which is compiled and kept; None where that cannot be."""
    if not machine_code.is_usable() or not _keeps_memory():
        return None
    made = _kept(name, kind, function)
    return None if made is None else made.address


def _kept(name: str, kind: Any, function: Callable[..., Any]) -> Any | None:
    put_in_place(function)
    # Not in numba's cache: what comes from there has no object any more.
    made: Any = numba.cfunc(kind)(function)
    try:
        code = made._library._get_compiled_object()
    except (AttributeError, ValueError, RuntimeError):  # another numba
        return None
    return made if machine_code.save(name, made.native_name, code) else None


@cache
def _keeps_memory() -> bool:
    """Keep what kernels call for the memory of arrays. Returns whether that went well, and numba is
    as it has to be."""
    fields = [str(field) for field in nrtdynmod._meminfo_struct_type.elements]
    if len(fields) != 5 or fields[0] != "i64" or fields[4] != "i64":
        return False
    kinds = types.intp(types.intp, types.uint32), types.void(types.intp)
    functions = _allocate, _release
    return all(
        machine_code.load(name) is not None or _kept(name, kind, function) is not None
        for name, kind, function in zip(machine_code.MEMORY, kinds, functions)
    )


def _allocate(size: int, align: int) -> int:
    start = _malloc(size + align + HEAD)
    if start == 0:
        return start
    info = numba.carray(memory.pointer(start), (5,), np.int64)
    # references, destructor and its argument, data, size
    info[0], info[1], info[2] = 1, 0, 0
    info[3] = (start + HEAD + align - 1) // align * align
    info[4] = size
    return start


def _release(start: int) -> None:
    _free(start)
