"""numba's compilers, imported when something has to be compiled, with what they make kept on disk.

numba keeps machine code beside the source, or in the user's cache where that cannot be written, or
in NUMBA_CACHE_DIR. Without any of them it refuses to compile at all; here it then compiles anew in
every process, which is said once. C functions (`entry`) are kept a second time by `machine_code`,
from where they are loaded without numba.

So a module of kernels must not import numba: it takes `numba`, `types`, `cgutils`, `njit` and
`intrinsic` from here. They stand for the real ones until something is compiled; then they are
replaced in all modules, because numba takes what it compiles from there.
"""

import hashlib
import importlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vqllm_kernels import machine_code

logger = logging.getLogger(__name__)


class _Module:
    """A module that is imported when it is used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real(), name)

    def _real(self) -> Any:
        return importlib.import_module(self._name)


class Later:
    """What numba makes of a function, made when it is used."""

    def __init__(self, function: Callable[..., Any], make: Callable[[], Any]) -> None:
        self.function = function
        self._make = make
        self._made: Any = None

    def __call__(self, *arguments: Any) -> Any:
        return self._in_place()(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._in_place(), name)

    def _in_place(self) -> Any:
        if self._made is None:
            put_in_place(self.function)
        return self._real()

    def _real(self) -> Any:
        if self._made is None:
            self._made = self._make()
            _fill(self.function)
        return self._made


numba: Any = _Module("numba")
types: Any = _Module("numba.core.types")
cgutils: Any = _Module("numba.core.cgutils")


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` without the interpreter's lock, kept on disk."""

    def decorate(function: Callable[..., Any]) -> Any:
        stamped = _stamped(function)

        def make() -> Any:
            try:
                return numba.njit(nogil=True, cache=True, **options)(stamped)
            except RuntimeError:  # no place for a cache
                _say_once()
                return numba.njit(nogil=True, **options)(stamped)

        return Later(stamped, make)

    return decorate


def intrinsic(*functions: Callable[..., Any], **options: Any) -> Any:
    """`numba.extending.intrinsic`."""

    def decorate(function: Callable[..., Any]) -> Any:
        def make() -> Any:
            real = importlib.import_module("numba.extending").intrinsic
            return real(**options)(function) if options else real(function)

        return Later(function, make)

    return decorate(*functions) if functions else decorate


def external(name: str, result: str, *arguments: str) -> Any:
    """A C function that `add_symbol` has named, with its types by numba's names."""

    def make() -> Any:
        kinds = [getattr(types, kind) for kind in (result, *arguments)]
        return types.ExternalFunction(name, kinds[0](*kinds[1:]))

    return Later(_nothing, make)


def add_symbol(name: str, address: int) -> None:
    """Name an address to compiled code that is compiled or loaded from now on."""
    machine_code.SYMBOLS[name] = address
    if "llvmlite.binding" in sys.modules:
        sys.modules["llvmlite.binding"].add_symbol(name, address)


def entry(function: Callable[..., None]) -> int:
    """The address of a C function of the address of some int64, compiled now or before."""
    name = _name(_stamped(function))
    if name is not None:
        address = machine_code.load(name)
        if address is not None:
            return address
    put_in_place(function)
    kind = types.void(types.CPointer(types.int64))
    if name is not None:
        from vqllm_kernels import keep_code

        address = keep_code.compiled(name, kind, function)
        if address is not None:
            return address
    try:
        return numba.cfunc(kind, cache=True)(function).address
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        _say_once()
        return numba.cfunc(kind)(function).address


def put_in_place(function: Callable[..., Any]) -> None:
    """Import numba, and put the real things where numba looks for them when it compiles this."""
    binding = importlib.import_module("llvmlite.binding")
    for name, address in machine_code.SYMBOLS.items():
        binding.add_symbol(name, address)
    for name, module in list(sys.modules.items()):
        if name.startswith(("vqllm_kernels.", "vqllm.codecs.")) and name != __name__:
            _replace(vars(module))
    _fill(function)


def _fill(function: Callable[..., Any]) -> None:
    """Replace in what a function sees."""
    _replace(function.__globals__)
    for cell in function.__closure__ or ():
        if isinstance(cell.cell_contents, _Module | Later):
            cell.cell_contents = cell.cell_contents._real()


def _replace(names: dict[str, Any]) -> None:
    if names.get("__name__") == __name__:
        return
    for name, value in list(names.items()):
        if isinstance(value, _Module | Later):
            names[name] = value._real()


def _nothing() -> None:
    pass


def _stamped(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under a name on disk that changes with the sources of its folder.

    numba compares the file of a function, but not those of the functions that it calls.
    """
    stamp = _stamp(str(Path(function.__code__.co_filename).parent))
    function.__qualname__ = f"{function.__qualname__}_{stamp}"
    return function


@cache
def _stamp(folder: str) -> str:
    files = [Path(__file__), *sorted(Path(folder).glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _name(function: Callable[..., Any]) -> str | None:
    """What tells a function from all others, or None: where its source is, of which its name has a
    sum, and what is closed over."""
    try:
        return repr(_identity(function))
    except TypeError:
        return None


def _identity(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if isinstance(value, tuple | list):
        return [_identity(item) for item in value]
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, Later):
        value = value.function
    # What numba has made of a function knows it: a dispatcher, or an intrinsic.
    function = getattr(value, "py_func", None) or getattr(value, "_defn", value)
    if not hasattr(function, "__code__"):
        raise TypeError(value)
    closed_over = [cell.cell_contents for cell in function.__closure__ or ()]
    line = function.__code__.co_firstlineno
    return function.__module__, function.__qualname__, line, _identity(closed_over)


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
