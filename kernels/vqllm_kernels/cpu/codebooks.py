"""Products with indices of at most 8 bits into one codebook, by AVX-512; else one by one.

A register has 8 indices of each of 8 rows. Every coordinate of the codebook is a table of up to 256
integers, one byte of each in up to four registers: two permutations look up 64 weights. Entries are
integers of one byte where they are so small (`e81b-v1`), and of two bytes where they are trained
numbers, rounded to a part in 65,024 of the largest one: float16 has a part in 2,048 of each.

Indices of fewer bits than 8 are kept as bytes beside the stored ones.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from torch import Tensor

from vqllm_kernels.compiled import entry, intrinsic, njit, numba, types
from vqllm_kernels.cpu import code_rows, memory, threads
from vqllm_kernels.cpu.activations import (
    LARGEST,
    NUM_ARGUMENTS,
    NUM_PANEL_ARGUMENTS,
    Operand,
)
from vqllm_kernels.cpu.instructions import Instructions
from vqllm_kernels.cpu.parts import Part, Product
from vqllm_kernels.cpu.sums import add_sums, scale_sums
from vqllm_kernels.cpu.vectors import INT32, INT64, Value, Vectors

TILE_ROWS = code_rows.ROWS
TILE_CODES = 8
"""Indices of a row in a register."""
SMALLEST = 64
"""Entries of a register: a smaller codebook is filled up."""
ROWS_AT_A_TIME = 4
"""Rows of x whose sums stay in registers: 16 of them with entries of two bytes."""


@dataclass(frozen=True)
class CodebookProduct:
    """What a kernel is compiled for."""

    instructions: Instructions
    entries: int
    """64, 128 or 256."""
    coordinates: int
    """Weights of an index."""
    entry_bytes: int
    """1 or 2."""
    rows: int
    """Rows of x."""

    @property
    def is_wide(self) -> bool:
        return self.instructions == "avx512"

    @property
    def tile_cols(self) -> int:
        return TILE_CODES * self.coordinates

    @property
    def extra(self) -> float:
        """What is added to all weights in registers, whose upper bytes are unsigned there."""
        return 128.0 * 256 ** (self.entry_bytes - 1) if self.is_wide else 0.0

    @property
    def most_tiles(self) -> int:
        """Tiles that sums of int32 are safe for."""
        return ((1 << 31) - 1) // (4 * 255 * 128 * self.coordinates)


def part(indices_RG: Tensor, entries_ED: Tensor, scale: float, instructions: Instructions) -> Part:
    """The codes of a linear with their kernels.

    Args:
        indices_RG: uint8 [rows, codes of a row].
        entries_ED: the codebook, int8 or int16 [entries, coordinates], at most 256 entries.
        scale: of the entries.
    """
    codes = indices_RG
    if missing := -codes.shape[1] % TILE_CODES:  # whole registers; x is 0 there
        codes = torch.nn.functional.pad(codes, (0, missing))
    codes = codes.contiguous()
    size = next(n for n in (SMALLEST, 128, 256) if len(entries_ED) <= n)
    entries_ED = torch.nn.functional.pad(entries_ED, (0, 0, 0, size - len(entries_ED)))
    entry_bytes = entries_ED.element_size()
    is_wide = instructions == "avx512"
    table = _planes(entries_ED) if is_wide else entries_ED.to(torch.int16).contiguous()
    coordinates = entries_ED.shape[1]

    def product(rows: int) -> Product:
        own = CodebookProduct(instructions, size, coordinates, entry_bytes, rows)
        operand = Operand(
            step_weights=4 if is_wide else 2,
            is_bytes=is_wide,
            rows=rows,
            factors=(1.0, 1.0),
            offsets=(own.extra, own.extra),
            plane_columns=coordinates if is_wide else 1,
        )
        return Product(kernel(own), operand, table)

    return Part(
        codes=codes,
        tile=(TILE_ROWS, TILE_CODES * coordinates),
        scale=scale,
        product=product,
        panel=lambda: panel_kernel(size, coordinates),
        panel_numbers=(0.0, 0.0, 0.0, 0.0),
        table=(entries_ED.float() * scale).bfloat16().view(torch.int16).contiguous(),
        kept_bytes=0 if codes.data_ptr() == indices_RG.data_ptr() else codes.nbytes,
    )


def rounded(entries_ED: Tensor) -> tuple[Tensor, float]:
    """A codebook as int16 of magnitudes up to LARGEST, and their scale, which is not a number where
    an entry is not finite.

    Args:
        entries_ED: float32 [entries, coordinates].
    """
    largest = float(entries_ED.abs().max())
    unit = largest / LARGEST if largest > 0 else 1.0
    if not np.isfinite(unit):
        return torch.zeros_like(entries_ED, dtype=torch.int16), float("nan")
    return (entries_ED.double() / unit).round().to(torch.int16), unit


def _planes(entries_ED: Tensor) -> Tensor:
    """Bytes of the codebook, the upper ones first, each coordinate by itself: uint8 [bytes,
    coordinates, entries]. 128 is added to the upper bytes."""
    wide = entries_ED.T.int()
    if entries_ED.dtype == torch.int8:
        return (wide + 128).to(torch.uint8)[None].contiguous()
    return torch.stack([(wide >> 8) + 128, wide & 255]).to(torch.uint8).contiguous()


@intrinsic(prefer_literal=True)
def sum_codes(
    typing_context: Any,
    rows: Any,
    entries: Any,
    coordinates: Any,
    entry_bytes: Any,
    codes: Any,
    stride: Any,
    last_row: Any,
    num_tiles: Any,
    operand: Any,
    apart: Any,
    out: Any,
    table: Any,
):
    """Sums of 8 rows of W over tiles of 8 indices.

    Args:
        rows: of x, a constant, as the next three are.
        codes: address of the indices of the first row.
        stride: bytes from one row to the next.
        last_row: of the 8, the last one that is there; those behind it repeat it.
        operand: address of int32 [2 rows, .., 2 coordinates num_tiles].
        apart: bytes from one part to the next.
        out: address of int32 [bytes of an entry, 2 rows, 8].
        table: address of `_planes`.
    """
    number, size = rows.literal_value, entries.literal_value
    width, planes = coordinates.literal_value, entry_bytes.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, stride, last_row, num_tiles, operand, apart, out, table = arguments[4:]
        v = Vectors(builder, "avx512")
        b = builder
        first_rows = code_rows.addresses(v, codes, stride, last_row)
        later = code_rows.ahead(v, codes, stride)
        parts = [v.step(operand, apart, part) for part in range(2 * number)]
        # Two chains of additions where there are registers for them.
        chains = 2 if number * planes <= 2 else 1
        sums = [[v.zeros(chains) for _ in parts] for _ in range(planes)]

        def look_up(plane: int, coordinate: int, index: Value) -> Value:
            at = (plane * width + coordinate) * size
            registers = [v.load(table, at + i, v.bytes) for i in range(0, size, 64)]
            if len(registers) < 4:
                return v.look_up(registers, index)
            return code_rows.look_up_256(v, registers, index)

        def tile(t: Value) -> None:
            v.prefetch(later, b.mul(t, v.int64(TILE_ROWS * TILE_CODES)))
            index = _indices(v, [b.add(row, b.mul(t, v.int64(TILE_CODES))) for row in first_rows])
            x_at = b.mul(t, v.int64(TILE_CODES * width))
            for i in range(width):
                weights = [look_up(plane, i, index) for plane in range(planes)]
                for p, part in enumerate(parts):
                    x = v.spread_long(b.add(part, x_at), 8 * i)
                    for own, total in zip(weights, sums):
                        place = total[p][i % chains]
                        b.store(v.add_bytes_products(b.load(place), own, x), place)

        v.loop(num_tiles, tile)
        for n, total in enumerate(total for plane in sums for total in plane):
            code_rows.store_sums(v, total, out, n)
        return context.get_dummy_value()

    address, size_of = types.uintp, types.intp
    constants = (rows, entries, coordinates, entry_bytes)
    signature = types.void(
        *constants, address, size_of, size_of, size_of, address, size_of, address, address
    )
    return signature, generate


def _indices(v: Vectors, rows: list[Value]) -> Value:
    """8 bytes of each of 8 rows."""
    value = ir.Constant(ir.VectorType(INT64, TILE_ROWS), ir.Undefined)
    for r, row in enumerate(rows):
        value = v.b.insert_element(value, v.load(row, 0, INT64), ir.Constant(INT32, r))
    return v.b.bitcast(value, v.bytes)


@cache
def kernel(product: CodebookProduct) -> int:
    """The address of a C function of NUM_ARGUMENTS numbers."""
    threads.available()
    return _wide_kernel(product) if product.is_wide else _plain_kernel(product)


def _wide_kernel(product: CodebookProduct) -> int:
    rows, entries, most = product.rows, product.entries, product.most_tiles
    coordinates, entry_bytes = product.coordinates, product.entry_bytes
    tile_cols, at_a_time = product.tile_cols, min(product.rows, ROWS_AT_A_TIME)

    def multiply(pointer: Any) -> None:
        a = numba.carray(pointer, (NUM_ARGUMENTS,))
        row_tiles, num_tiles = a[1], a[2]
        codes, x, apart, out, table, all_rows = a[3], a[4], a[5], a[6], a[8], a[9]
        of_row = numba.carray(memory.pointer(a[7]), (2, rows), np.float64)
        y = numba.carray(memory.pointer(out), (rows, row_tiles * TILE_ROWS), np.float32)
        me = threads.number() if a[0] > 1 else 0
        found = np.empty((entry_bytes, 2 * at_a_time, TILE_ROWS), np.int32)
        totals = np.empty((entry_bytes, rows, TILE_ROWS), np.int64)
        stride = num_tiles * TILE_CODES
        for i in range(row_tiles * me // a[0], row_tiles * (me + 1) // a[0]):
            totals[:] = 0
            last = min(TILE_ROWS, all_rows - i * TILE_ROWS) - 1
            for j in range(0, num_tiles, most):
                for n in range(0, rows, at_a_time):
                    sum_codes(
                        at_a_time,
                        entries,
                        coordinates,
                        entry_bytes,
                        codes + i * TILE_ROWS * stride + j * TILE_CODES,
                        stride,
                        last,
                        min(most, num_tiles - j),
                        x + j * tile_cols + 2 * n * apart,
                        apart,
                        found.ctypes.data,
                        table,
                    )
                    for plane in range(entry_bytes):
                        add_sums(found[plane], True, totals[plane, n : n + at_a_time])
            if entry_bytes == 2:
                for n in range(rows):
                    for r in range(TILE_ROWS):
                        totals[1, n, r] += totals[0, n, r] << 8
            scale_sums(totals[entry_bytes - 1], of_row, i * TILE_ROWS, y)

    return entry(multiply)


def _plain_kernel(product: CodebookProduct) -> int:
    rows, entries, coordinates = product.rows, product.entries, product.coordinates

    def multiply(pointer: Any) -> None:
        a = numba.carray(pointer, (NUM_ARGUMENTS,))
        row_tiles, num_tiles = a[1], a[2]
        codes, x, apart, out, all_rows = a[3], a[4], a[5], a[6], a[9]
        table = numba.carray(memory.pointer(a[8]), (entries, coordinates), np.int16)
        of_row = numba.carray(memory.pointer(a[7]), (2, rows), np.float64)
        y = numba.carray(memory.pointer(out), (rows, row_tiles * TILE_ROWS), np.float32)
        me = threads.number() if a[0] > 1 else 0
        stride = num_tiles * TILE_CODES
        totals = np.zeros((rows, TILE_ROWS), np.int64)
        for i in range(row_tiles * me // a[0], row_tiles * (me + 1) // a[0]):
            totals[:] = 0
            for r in range(min(TILE_ROWS, all_rows - i * TILE_ROWS)):
                at = codes + (i * TILE_ROWS + r) * stride
                own = numba.carray(memory.pointer(at), (stride,), np.uint8)
                for n in range(rows):
                    totals[n, r] = _sum_entries(own, table, x + n * apart)
            scale_sums(totals, of_row, i * TILE_ROWS, y)

    return entry(multiply)


@njit()
def _sum_entries(codes: Any, table: Any, x: int) -> Any:
    """Of one row of W and one of x, which is words in the order of columns."""
    words = numba.carray(memory.pointer(x), (len(codes), table.shape[1]), np.int16)
    total = np.int64(0)
    for j in range(len(codes)):
        for i in range(table.shape[1]):
            total += np.int64(np.int32(table[codes[j], i]) * np.int32(words[j, i]))
    return total


@cache
def panel_kernel(entries: int, coordinates: int) -> int:
    """The address of a C function of NUM_PANEL_ARGUMENTS numbers that decodes rows of tiles: it
    copies entries that are bfloat16 already."""
    threads.available()

    def decode_rows(pointer: Any) -> None:
        a = numba.carray(pointer, (NUM_PANEL_ARGUMENTS,))
        first, stop, num_tiles = a[1], a[2], a[3]
        codes, out, apart, all_rows = a[4], a[5], a[6], a[9]
        me = threads.number() if a[0] > 1 else 0
        table = numba.carray(memory.pointer(a[8]), (entries, coordinates), np.int16)
        start, end = first * TILE_ROWS, min(stop * TILE_ROWS, all_rows)
        own = numba.carray(memory.pointer(codes), (end, TILE_CODES * num_tiles), np.uint8)
        num_codes = TILE_CODES * num_tiles
        for j in range(num_codes * me // a[0], num_codes * (me + 1) // a[0]):
            for i in range(coordinates):
                at = out + (coordinates * j + i) * apart
                y = numba.carray(memory.pointer(at), (end - start,), np.int16)
                for r in range(start, end):
                    y[r - start] = table[own[r, j], i]

    return entry(decode_rows)
