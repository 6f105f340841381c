"""Machine code of compiled kernels, kept on disk and loaded without the compiler.

numba takes 140 MB of resident memory as soon as it loads a function that it has compiled before:
LLVM, and what it knows of Python and numpy. A function whose machine code is here takes none of it.
Only C functions are kept (`compiled.entry`), one file each: a line of JSON, then the relocatable
object that LLVM made (ELF, x86-64, large code model, so that every reference is 64 bits wide).

Nothing is loaded unless all of it is understood: the versions, the processor, numba's settings, the
checksum, every relocation and every symbol. Whatever is not is left to numba, as are other systems.
"""

import ctypes
import hashlib
import json
import mmap
import os
import platform
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vqllm_kernels import elf

SYMBOLS: dict[str, int] = {}
"""Addresses of what kernels call by a name of ours."""

_ONLY_IN_ERRORS = frozenset(
    (
        "numba_do_raise",
        "numba_gil_ensure",
        "numba_gil_release",
        "numba_runtime_build_excinfo_struct",
        "numba_unpickle",
    )
)
"""What numba calls for an exception alone. Kernels raise none; one that did would stop the process
here, where numba would print the exception and go on with wrong numbers."""

_OF_C = {"NRT_Allocate": "malloc", "NRT_Free": "free"}
"""What numba has for C's functions: memory that is not that of an array."""
MEMORY = ("NRT_MemInfo_alloc_aligned", "NRT_MemInfo_call_dtor")
"""What numba calls for the memory of arrays: kept like a function, by these names."""

_loaded: list[mmap.mmap] = []


@cache
def is_usable() -> bool:
    """Whether machine code is kept and loaded on this system."""
    return (
        sys.platform == "linux"
        and platform.machine() == "x86_64"
        and sys.implementation.name == "cpython"
        and not Path(".numba_config.yaml").exists()  # settings that only numba reads
        and _made_for() is not None
    )


def load(name: str) -> int | None:
    """The address of a kept function, or None."""
    for folder in _folders() if is_usable() else ():
        try:
            content = (folder / _file(name)).read_bytes()
        except OSError:
            continue
        line, _, code = content.partition(b"\n")
        try:
            told = json.loads(line)
            if told["name"] != name or told["sha256"] != hashlib.sha256(code).hexdigest():
                continue
            memory, symbols = elf.load(code, _address)
        except (ValueError, KeyError, OSError):
            continue
        _loaded.append(memory)
        return symbols.get(told["symbol"])
    return None


def save(name: str, symbol: str, code: bytes) -> bool:
    """Keep a function. Returns whether there was a place for it."""
    told = {"name": name, "symbol": symbol, "sha256": hashlib.sha256(code).hexdigest()}
    return _write(_file(name), json.dumps(told).encode() + b"\n" + code)


def facts() -> Mapping[str, Any]:
    """What was kept with `save_facts`, by name."""
    for folder in _folders() if is_usable() else ():
        try:
            return json.loads((folder / _file("facts")).read_bytes())
        except (OSError, ValueError):
            continue
    return {}


def save_facts(**values: Any) -> None:
    """Keep what takes the compiler to be known of this processor."""
    if is_usable():
        _write(_file("facts"), json.dumps({**facts(), **values}).encode())


def _write(file: str, content: bytes) -> bool:
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            beside = folder / f"{file}.{os.getpid()}"
            beside.write_bytes(content)
            beside.replace(folder / file)
        except OSError:
            continue
        return True
    return False


def _folders() -> list[Path]:
    """Where files may be, as numba has them: the folder that was asked for, or beside the package,
    or the user's."""
    if own := os.environ.get("NUMBA_CACHE_DIR"):
        return [Path(own)]
    user = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return [Path(__file__).parent / "__pycache__", Path(user) / "vqllm" / "kernels"]


def _file(name: str) -> str:
    return f"{hashlib.sha256(f'{_made_for()} {name}'.encode()).hexdigest()[:24]}.kernel"


@cache
def _made_for() -> str | None:
    """What machine code depends on beside its source: the compiler, its settings, the processor."""
    try:
        versions = [version(name) for name in ("numba", "llvmlite", "numpy")]
        with open("/proc/cpuinfo") as lines:
            cpu = {line.partition(":")[0].strip(): line for line in lines}
        processor = [cpu[key] for key in ("vendor_id", "model", "cpu family", "stepping", "flags")]
    except (PackageNotFoundError, OSError, KeyError):
        return None
    settings = sorted(
        (name, value)
        for name, value in os.environ.items()
        if name.startswith("NUMBA_") and name != "NUMBA_CACHE_DIR"
    )
    return repr((sys.version_info[:2], versions, processor, settings))


def _address(name: str) -> int:
    """The address of a symbol that is not in the object. ValueError for one not understood."""
    if name in SYMBOLS:
        return SYMBOLS[name]
    if name in _ONLY_IN_ERRORS:
        return _of_process("abort")
    if name in _OF_C:
        return _of_process(_OF_C[name])
    if name in MEMORY and (address := _of_memory(name)) is not None:
        return address
    if name.startswith(("numba_", "NRT_")):
        raise ValueError(name)
    return _of_process(name)


@cache
def _of_memory(name: str) -> int | None:
    return load(name)


def _of_process(name: str) -> int:
    return ctypes.addressof(ctypes.c_char.in_dll(ctypes.CDLL(None), name))
