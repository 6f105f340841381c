"""Look-ups in registers, 64 at a time, for processors with AVX-512 VBMI. No lock is held.

The products of a piece of x with all entries are rounded to integers of 3 bytes, which lie
apart in planes. A plane of 256 bytes is four registers, from which two permutations and a
selection take the bytes of 64 codes at once. They are summed as integers: within a chunk of pieces,
which shares one scale, nothing is rounded.

Source: vpermi2b, Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

LANES = 64
BLOCK = 2 * LANES
"""Rows that are summed together: the planes of a piece are loaded once for two vectors of codes."""
PLANES = 3
"""Bytes of a product: as exact as sums in float32; beside an outlier of 10⁴ the error is 9 · 10⁻⁷
where torch has 4 · 10⁻⁷. Two bytes have 5 · 10⁻⁵ without one, and save a quarter of the time."""
CHUNK = 64
"""Pieces with one scale: the sum of so many bytes fits in 16 bits (up to 257 would), that of so
many products in 32. 128 is no faster."""

_BYTES = ir.VectorType(ir.IntType(8), LANES)
_WORDS = ir.VectorType(ir.IntType(16), LANES // 2)
_HALF = 1 << (8 * PLANES - 1)


def available() -> bool:
    """Whether numba compiles for a processor that has the instruction."""
    context: Any = cpu_target.target_context
    return "+avx512vbmi" in context.codegen().magic_tuple()[2].split(",")


def arrange(codes_GR: Tensor) -> Tensor:
    """Codes, uint8 [pieces, rows], in the order in which they are read, [pieces · padded rows].

    One chunk of pieces after the other, in a chunk one block of rows, in a block one piece. Rows i
    and i + 32 of 64 are neighbours: the two bytes of a word."""
    num_pieces, rows = codes_GR.shape
    padded = torch.nn.functional.pad(codes_GR, (0, -rows % BLOCK))
    paired = padded.view(num_pieces, -1, BLOCK // LANES, 2, LANES // 2).transpose(-1, -2)
    blocks = paired.reshape(num_pieces, -1, BLOCK).transpose(0, 1)
    return torch.cat([part.reshape(-1) for part in blocks.split(CHUNK, dim=1)])


@cache
def kernel(num_entries: int) -> Callable[..., None]:
    """The function for tables of 128 or 256 entries:

    add(x_GD float32 [pieces, d], entries_DE float32 [d, entries], codes uint8 as `arrange` leaves
        them, out_R float32 [padded rows])

    out[r] = Σ of x[g] · entries[:, code of g and r] over the pieces g.
    """

    @numba.njit(nogil=True, cache=True, fastmath={"contract", "nsz"})
    def add(
        x_GD: NDArray[np.float32],
        entries_DE: NDArray[np.float32],
        codes: NDArray[np.uint8],
        out_R: NDArray[np.float32],
    ) -> None:
        products_GE = np.empty((CHUNK, num_entries), np.float32)
        tables_GPE = np.empty((CHUNK, PLANES, num_entries), np.uint8)
        sums = np.empty((BLOCK // LANES, PLANES, 2, LANES // 2), np.uint16)
        num_pieces, rows = len(x_GD), len(out_R)
        out_R[:] = 0
        for start in range(0, num_pieces, CHUNK):
            stop = min(start + CHUNK, num_pieces)
            _multiply(x_GD[start:stop], entries_DE, products_GE)
            unit = _round(products_GE[: stop - start], tables_GPE)
            for r in range(0, rows, BLOCK):
                own = codes[start * rows + r * (stop - start) :]
                _sum_bytes(  # pyright: ignore[reportCallIssue]
                    num_entries,
                    tables_GPE.ctypes.data,
                    own.ctypes.data,
                    stop - start,
                    sums.ctypes.data,
                )
                for i in range(BLOCK // LANES):
                    _add_scaled(sums[i], stop - start, unit, out_R[r + i * LANES :])

    return add


@numba.njit(nogil=True, cache=True, fastmath={"contract", "nsz"})
def _multiply(
    x_GD: NDArray[np.float32], entries_DE: NDArray[np.float32], products_GE: NDArray[np.float32]
) -> None:
    """Inner products of pieces with entries. torch's product takes four times as long, d being
    small."""
    width, num_entries = entries_DE.shape
    for g in range(len(x_GD)):
        x, row = x_GD[g], products_GE[g]
        row[:] = 0
        k = 0
        while k + 4 <= width:
            a, b, c, d = entries_DE[k], entries_DE[k + 1], entries_DE[k + 2], entries_DE[k + 3]
            for e in range(num_entries):
                row[e] += (x[k] * a[e] + x[k + 1] * b[e]) + (x[k + 2] * c[e] + x[k + 3] * d[e])
            k += 4
        while k < width:
            a = entries_DE[k]
            for e in range(num_entries):
                row[e] += x[k] * a[e]
            k += 1


@numba.njit(nogil=True, cache=True, fastmath={"contract", "nsz"})
def _round(products_GE: NDArray[np.float32], tables_GPE: NDArray[np.uint8]) -> float:
    """Fills tables[g, p, e] with byte p of the product in units, plus 2^23; returns the unit."""
    num_pieces, num_entries = products_GE.shape
    # As integers, so that the largest of values with a NaN is NaN: so is the unit then, and y.
    pattern_GE = products_GE.view(np.int32)
    largest = np.zeros(1, np.int32)
    for g in range(num_pieces):
        for e in range(num_entries):
            largest[0] = max(largest[0], pattern_GE[g, e] & np.int32(0x7FFFFFFF))
    limit, top = np.float32(_HALF - 2), largest.view(np.float32)[0]
    per_unit = limit / top if top > np.float32(1e-30) else np.float32(0)
    integers = np.empty(num_entries, np.int32)
    for g in range(num_pieces):
        row = products_GE[g]
        for e in range(num_entries):
            scaled = row[e] * per_unit
            away = np.float32(0.5) if scaled > 0 else np.float32(-0.5)
            integers[e] = np.int32(scaled + away) + np.int32(_HALF)
        for p in range(PLANES):
            plane, shift = tables_GPE[g, p], np.int32(8 * p)
            for e in range(num_entries):
                plane[e] = np.uint8(integers[e] >> shift)
    return top / limit


@numba.njit(nogil=True, cache=True, fastmath={"contract", "nsz"})
def _add_scaled(
    sums: NDArray[np.uint16], num_pieces: int, unit: float, out_R: NDArray[np.float32]
) -> None:
    """Adds the sums of 64 rows, [planes, 2, 32] as `_sum_bytes` leaves them."""
    for r in range(LANES // 2):
        low = high = np.int32(-num_pieces * _HALF)
        for p in range(PLANES):
            upper = np.int32(sums[p, 1, r])
            lower = (np.int32(sums[p, 0, r]) - (upper << np.int32(8))) & np.int32(0xFFFF)
            low += lower << np.int32(8 * p)
            high += upper << np.int32(8 * p)
        out_R[r] += unit * np.float32(low)
        out_R[LANES // 2 + r] += unit * np.float32(high)


@intrinsic(prefer_literal=True)
def _sum_bytes(typing_context, num_entries, tables, codes, num_pieces, out):
    """Sums of the looked-up bytes of BLOCK rows over pieces.

    Args:
        num_entries: a constant, 128 or 256.
        tables: address of uint8 [pieces, planes, entries].
        codes: address of uint8 [pieces, BLOCK].
        out: address of uint16 [2, planes, 2, 32], for each vector of 64 rows and each plane the
            sums of pairs of bytes as 16-bit words, modulo 2^16, and those of their upper bytes.
    """
    registers = num_entries.literal_value // LANES

    def generate(context, builder, signature, arguments):
        tables, codes, num_pieces, out = arguments[1:]
        permute = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_BYTES, [_BYTES] * 3),
            "llvm.x86.avx512.vpermi2var.qi.512",
        )
        eight = ir.Constant(_WORDS, [8] * _WORDS.count)

        def at(start, number, size, kind):
            offset = builder.mul(number, ir.Constant(number.type, size))
            return builder.inttoptr(builder.add(start, offset), kind.as_pointer())

        def load(start, i):
            pointer = builder.gep(start, [ir.Constant(ir.IntType(32), i)])
            return builder.load(pointer, align=1)

        def look_up(table, index, upper):
            found = [
                builder.call(permute, [table[i], index, table[i + 1]])
                for i in range(0, registers, 2)
            ]
            return found[0] if len(found) == 1 else builder.select(upper, found[1], found[0])

        zeros = ir.Constant(_WORDS, None)
        sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(2 * PLANES * 2)]
        with cgutils.for_range(builder, num_pieces) as loop:
            start = at(tables, loop.index, PLANES * registers * LANES, _BYTES)
            table = [load(start, i) for i in range(PLANES * registers)]
            for i in range(2):
                index = load(at(codes, loop.index, BLOCK, _BYTES), i)
                upper = builder.icmp_signed("<", index, ir.Constant(_BYTES, None))
                for p in range(PLANES):
                    found = look_up(table[p * registers : (p + 1) * registers], index, upper)
                    words = builder.bitcast(found, _WORDS)
                    whole, high = sums[(i * PLANES + p) * 2 :][:2]
                    builder.store(builder.add(builder.load(whole), words), whole)
                    upper_bytes = builder.lshr(words, eight)
                    builder.store(builder.add(builder.load(high), upper_bytes), high)
        first = builder.inttoptr(out, _WORDS.as_pointer())
        for i, total in enumerate(sums):
            pointer = builder.gep(first, [ir.Constant(ir.IntType(32), i)])
            builder.store(builder.load(total), pointer, align=1)
        return context.get_dummy_value()

    address = types.uintp
    signature = types.void(num_entries, address, address, types.intp, address)
    return signature, generate
