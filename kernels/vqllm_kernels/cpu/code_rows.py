"""Codes that lie row by row: what the kernels that read 8 rows at a time have in common.

kernel        the loop over rows and tiles, around what adds up some tiles of 8 rows
the others    instructions that those have in common
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir

from vqllm_kernels.compiled import entry, numba, types
from vqllm_kernels.cpu import memory, threads
from vqllm_kernels.cpu.activations import NUM_ARGUMENTS
from vqllm_kernels.cpu.sums import add_lanes, add_sums, scale_sums
from vqllm_kernels.cpu.tiles import AHEAD
from vqllm_kernels.cpu.vectors import INT32, INT64, Value, Vectors

ROWS = 8
"""Rows of W that are read together: a register has the same number of bytes of each."""


CODES = 8
"""Codes of a row that are read together: a tile."""


@dataclass(frozen=True)
class RowKernel:
    """What `kernel` is compiled for."""

    add_up: Callable[..., None]
    """add_up(key, codes, stride, last row, tiles, operand, apart, out, table): sums of 8 rows of W,
    of which the last one that is there is given. `codes` is the address of the codes of the first
    one, `stride` the bytes from one row to the next, `operand` the address of x, `apart` the bytes
    from one part of it to the next, `out` the address of int32 [planes, parts of `rows_together`
    rows of x, 8, lanes], `table` that of what is looked up."""
    key: str
    """A constant for the compiler."""
    rows: int
    """Rows of x."""
    rows_together: int
    """Of these, so many at a time."""
    planes: int
    """With 2, sums of the upper bytes of all weights, and those of the lower ones."""
    is_bytes: bool
    """Whether a row of x is two parts, bytes; else words."""
    lanes: int
    """Sums that are to be added for each row of W."""
    most_tiles: int
    """Tiles that sums of int32 are safe for."""
    tile_bytes: int
    """Of the codes of a row."""
    step_bytes: int
    """Of x, for a tile."""


@cache
def kernel(own: RowKernel) -> int:
    """The address of a C function of NUM_ARGUMENTS numbers."""
    threads.available()
    add_up, key, rows, together = own.add_up, own.key, own.rows, own.rows_together
    planes, is_bytes, lanes, most = own.planes, own.is_bytes, own.lanes, own.most_tiles
    tile_bytes, step_bytes, parts = own.tile_bytes, own.step_bytes, 2 if own.is_bytes else 1

    def multiply(pointer: Any) -> None:
        a = numba.carray(pointer, (NUM_ARGUMENTS,))
        row_tiles, num_tiles = a[1], a[2]
        codes, x, apart, out, table, all_rows = a[3], a[4], a[5], a[6], a[8], a[9]
        of_row = numba.carray(memory.pointer(a[7]), (2, rows), np.float64)
        y = numba.carray(memory.pointer(out), (rows, row_tiles * ROWS), np.float32)
        me = threads.number() if a[0] > 1 else 0
        found = np.empty((planes, parts * together, ROWS, lanes), np.int32)
        totals = np.empty((planes, rows, ROWS), np.int64)
        stride = num_tiles * tile_bytes
        for i in range(row_tiles * me // a[0], row_tiles * (me + 1) // a[0]):
            totals[:] = 0
            last = min(ROWS, all_rows - i * ROWS) - 1
            for j in range(0, num_tiles, most):
                for n in range(0, rows, together):
                    add_up(
                        key,
                        codes + i * ROWS * stride + j * tile_bytes,
                        stride,
                        last,
                        min(most, num_tiles - j),
                        x + j * step_bytes + n * parts * apart,
                        apart,
                        found.ctypes.data,
                        table,
                    )
                    for plane in range(planes):
                        some = totals[plane, n : n + together]
                        if is_bytes:
                            add_sums(found[plane, :, :, 0], True, some)
                        else:
                            add_lanes(found[plane], some)
            if planes == 2:
                for n in range(rows):
                    for r in range(ROWS):
                        totals[1, n, r] += totals[0, n, r] << 8
            scale_sums(totals[planes - 1], of_row, i * ROWS, y)

    return entry(multiply)


def signature(key: Any) -> Any:
    """The types of `RowKernel.add_up`."""
    address, size = types.uintp, types.intp
    return types.void(key, address, size, size, size, address, size, address, address)


def addresses(v: Vectors, codes: Value, stride: Value, last_row: Value) -> list[Value]:
    """Where the rows begin.

    Args:
        codes: address of the first one.
        stride: bytes from one row to the next.
        last_row: of the 8, the last one that is there; those behind it repeat it.
    """
    found = []
    for r in range(ROWS):
        row = ir.Constant(INT64, r)
        row = v.b.select(v.b.icmp_signed("<", row, last_row), row, last_row)
        found.append(v.b.add(codes, v.b.mul(row, stride)))
    return found


def ahead(v: Vectors, codes: Value, stride: Value) -> Value:
    """The address from which on codes are asked for while these rows are read: rows lie one behind
    the other, so that it is where the next 8 begin, or further where those are short."""
    block = v.b.mul(stride, v.int64(ROWS))
    far = v.b.select(v.b.icmp_signed(">", block, v.int64(AHEAD)), block, v.int64(AHEAD))
    return v.b.add(codes, far)


def store_sums(v: Vectors, chains: list[Value], out: Value, number: int) -> None:
    """Add up the chains of a sum, and the two int32 that each row has in it, and write the 8 int32
    to place `number` of `out`."""
    total = v.b.load(chains[0])
    for other in chains[1:]:
        total = v.b.add(total, v.b.load(other))
    even, odd = (
        v.b.shuffle_vector(
            total, total, ir.Constant(ir.VectorType(INT32, ROWS), list(range(k, 2 * ROWS, 2)))
        )
        for k in range(2)
    )
    v.store(v.b.add(even, odd), out, 4 * ROWS * number)


def look_up_256(v: Vectors, table: list[Value], index: Value) -> Value:
    """Bytes of a table of 256 in four registers."""
    upper = v.b.icmp_signed("<", index, ir.Constant(v.bytes, [0] * 64))
    return v.b.select(upper, v.look_up(table[2:], index), v.look_up(table[:2], index))
