"""Machine code of kernels that is kept on disk, and loaded without the compiler."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

from vqllm_kernels import compiled, elf, machine_code
from vqllm_kernels.compiled import njit, numba

pytestmark = pytest.mark.skipif(not machine_code.is_usable(), reason="only numba's own cache")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine_code, "_folders", lambda: [tmp_path])
    return tmp_path


@njit()
def total(values: Any) -> int:
    copy = np.empty(len(values), np.int64)
    copy[:] = values
    return copy.sum()


def kernel(size: int) -> Any:
    def add_up(pointer: Any) -> None:
        values = numba.carray(pointer, (size,))
        values[0] = total(values)

    return add_up


def called(address: int, *values: int) -> int:
    numbers = np.array(values, np.int64)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(numbers.ctypes.data)
    return int(numbers[0])


def kept(folder: Path) -> Path:
    """The file of the kernel, which is the largest."""
    return max(folder.glob("*.kernel"), key=lambda path: path.stat().st_size)


def test_what_was_kept_computes_the_same(folder: Path) -> None:
    assert called(compiled.entry(kernel(3)), 1, 2, 3) == 6
    path = kept(folder)
    content = path.read_bytes()
    assert called(compiled.entry(kernel(3)), 1, 2, 3) == 6
    assert called(compiled.entry(kernel(4)), 1, 2, 3, 4) == 10, "closed over another number"

    # A damaged one is not loaded, but compiled anew.
    for damaged in (content[:-50], content[:-50] + bytes(50), b"", b"{}\n"):
        path.write_bytes(damaged)
        assert called(compiled.entry(kernel(3)), 1, 2, 3) == 6

    code = content.partition(b"\n")[2]
    _, symbols = elf.load(code, lambda name: 8)
    assert any(name.startswith("cfunc.") for name in symbols)
    for end in range(0, len(code), 97):
        with pytest.raises(ValueError, match=r"object|bytes|substring|unpack"):
            elf.load(code[:end], lambda name: 8)

    def unknown(name: str) -> int:
        raise ValueError(name)

    with pytest.raises(ValueError, match=r"NRT_|Py|numba_"):
        elf.load(code, unknown)


def test_another_process_needs_no_compiler(tmp_path: Path) -> None:
    code = """
import sys
from vqllm_kernels.cpu import instructions, tiles, trellis
own = instructions.instructions()
print(trellis.kernel(tiles.TileProduct(own, "bytes2", 64, 512, 10, 1)) != 0)
print([name for name in ("numba", "llvmlite.binding") if name in sys.modules])
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    options = {"capture_output": True, "text": True, "check": True, "env": environment}
    first = subprocess.run(command, **options).stdout.splitlines()
    second = subprocess.run(command, **options).stdout.splitlines()
    assert first == ["True", "['numba', 'llvmlite.binding']"]
    assert second == ["True", "[]"]
