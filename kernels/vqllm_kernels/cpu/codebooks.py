"""Products with indices of at most 8 bits into one codebook.

With AVX-512 a register has 8 indices of each of 8 rows. Every coordinate of the codebook is a table
of up to 256 integers, one byte of each in up to four registers: two permutations look up 64
weights. Entries are integers of one byte where they are so small (`e81b-v1`), and of two bytes
where they are trained numbers, rounded to a part in 65,024 of the largest one: float16 has a part
in 2,048 of each.

Else entries are looked up as words, one by one (`code_words`).

Indices of fewer bits than 8 are kept as bytes beside the stored ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from torch import Tensor

from vqllm_kernels.compiled import entry, intrinsic, numba
from vqllm_kernels.cpu import code_rows, memory, threads
from vqllm_kernels.cpu.activations import LARGEST, NUM_PANEL_ARGUMENTS, Operand
from vqllm_kernels.cpu.code_rows import CODES, ROWS, RowKernel
from vqllm_kernels.cpu.code_words import WordProduct, table_of
from vqllm_kernels.cpu.instructions import Instructions
from vqllm_kernels.cpu.parts import Part, Product
from vqllm_kernels.cpu.vectors import INT32, INT64, Value, Vectors

SMALLEST = 64
"""Entries of a register: a smaller codebook is filled up."""
ROWS_AT_A_TIME = 4
"""Rows of x whose sums stay in registers: 16 of them with entries of two bytes."""


@dataclass(frozen=True)
class CodebookProduct:
    """What a kernel is compiled for, with AVX-512."""

    entries: int
    """64, 128 or 256."""
    coordinates: int
    """Weights of an index."""
    entry_bytes: int
    """1 or 2."""
    rows: int
    """Rows of x."""

    @property
    def key(self) -> str:
        """The fields as a text, a constant for the compiler."""
        return "/".join(map(str, vars(self).values()))

    @classmethod
    def of(cls, key: str) -> "CodebookProduct":
        return cls(*map(int, key.split("/")))

    @property
    def rows_together(self) -> int:
        return min(self.rows, ROWS_AT_A_TIME)

    def row_kernel(self) -> RowKernel:
        return RowKernel(
            add_up=sum_codes,
            key=self.key,
            rows=self.rows,
            rows_together=self.rows_together,
            planes=self.entry_bytes,
            is_bytes=True,
            lanes=1,
            most_tiles=((1 << 31) - 1) // (4 * 255 * 128 * self.coordinates),
            tile_bytes=CODES,
            step_bytes=CODES * self.coordinates,
        )

    @property
    def operand(self) -> Operand:
        extra = 128.0 * 256 ** (self.entry_bytes - 1)  # the upper bytes are unsigned in registers
        return Operand(
            step_weights=4,
            is_bytes=True,
            rows=self.rows,
            factors=(1.0, 1.0),
            offsets=(extra, extra),
            plane_columns=self.coordinates,
        )


def part(indices_RG: Tensor, entries_ED: Tensor, scale: float, instructions: Instructions) -> Part:
    """The codes of a linear with their kernels.

    Args:
        indices_RG: uint8 [rows, codes of a row].
        entries_ED: the codebook, int8 or int16 [entries, coordinates], at most 256 entries.
        scale: of the entries.
    """
    codes = indices_RG
    if missing := -codes.shape[1] % CODES:  # whole registers; x is 0 there
        codes = torch.nn.functional.pad(codes, (0, missing))
    codes = codes.contiguous()
    size = next(n for n in (SMALLEST, 128, 256) if len(entries_ED) <= n)
    entries_ED = torch.nn.functional.pad(entries_ED, (0, 0, 0, size - len(entries_ED)))
    coordinates = entries_ED.shape[1]
    product = _in_bytes if instructions == "avx512" else partial(_in_words, instructions)
    return Part(
        codes=codes,
        tile=(ROWS, CODES * coordinates),
        scale=scale,
        product=product(entries_ED),
        panel=lambda: panel_kernel(size, coordinates),
        panel_numbers=(0.0, 0.0, 0.0, 0.0),
        table=(entries_ED.float() * scale).bfloat16().view(torch.int16).contiguous(),
        kept_bytes=0 if codes.data_ptr() == indices_RG.data_ptr() else codes.nbytes,
    )


def _in_bytes(entries_ED: Tensor) -> Callable[[int], Product]:
    table = _planes(entries_ED)

    def product(rows: int) -> Product:
        entries, coordinates = entries_ED.shape
        own = CodebookProduct(entries, coordinates, entries_ED.element_size(), rows)
        return Product(code_rows.kernel(own.row_kernel()), own.operand, table)

    return product


def _in_words(instructions: Instructions, entries_ED: Tensor) -> Callable[[int], Product]:
    table, planes = table_of([entries_ED]), entries_ED.element_size()
    # Of planes the lower one is unsigned.
    largest = 128 if planes == 1 else 255

    def product(rows: int) -> Product:
        own = WordProduct(instructions, 1, entries_ED.shape[1], planes, largest, rows)
        return Product(code_rows.kernel(own.row_kernel()), own.operand, table)

    return product


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
    key: Any,
    codes: Any,
    stride: Any,
    last_row: Any,
    num_tiles: Any,
    operand: Any,
    apart: Any,
    out: Any,
    table: Any,
):
    """Sums of 8 rows of W, as `RowKernel.add_up` says; the key is that of a `CodebookProduct`."""
    product = CodebookProduct.of(key.literal_value)
    number, size = product.rows_together, product.entries
    width, planes = product.coordinates, product.entry_bytes

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, stride, last_row, num_tiles, operand, apart, out, table = arguments[1:]
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
            v.prefetch(later, b.mul(t, v.int64(ROWS * CODES)))
            index = _indices(v, [b.add(row, b.mul(t, v.int64(CODES))) for row in first_rows])
            x_at = b.mul(t, v.int64(CODES * width))
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

    return code_rows.signature(key), generate


def _indices(v: Vectors, rows: list[Value]) -> Value:
    """8 bytes of each of 8 rows."""
    value = ir.Constant(ir.VectorType(INT64, ROWS), ir.Undefined)
    for r, row in enumerate(rows):
        value = v.b.insert_element(value, v.load(row, 0, INT64), ir.Constant(INT32, r))
    return v.b.bitcast(value, v.bytes)


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
        start, end = first * ROWS, min(stop * ROWS, all_rows)
        own = numba.carray(memory.pointer(codes), (end, CODES * num_tiles), np.uint8)
        num_codes = CODES * num_tiles
        for j in range(num_codes * me // a[0], num_codes * (me + 1) // a[0]):
            for i in range(coordinates):
                at = out + (coordinates * j + i) * apart
                y = numba.carray(memory.pointer(at), (end - start,), np.int16)
                for r in range(start, end):
                    y[r - start] = table[own[r, j], i]

    return entry(decode_rows)
