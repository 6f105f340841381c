"""Codes whose weights are words of tables: with AVX2, and without vectors.

A byte of a code leads to the weights of the code, int16 side by side in a table that stays in the
first cache; those of all bytes of a code are combined by exclusive or. Words are multiplied with
words of x in the order of columns, so that nothing is moved but addresses.

Weights of more than a byte are multiplied in two planes, their upper and their lower byte, because
sums of int32 would be too small for them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from torch import Tensor

from vqllm_kernels.compiled import intrinsic, njit, numba
from vqllm_kernels.cpu import code_rows, memory
from vqllm_kernels.cpu.activations import LARGEST, Operand
from vqllm_kernels.cpu.code_rows import CODES, ROWS, RowKernel
from vqllm_kernels.cpu.instructions import Instructions
from vqllm_kernels.cpu.vectors import INT64, Value, Vectors

SUMS = 8
"""Registers for sums, of rows of W and of x and of planes."""
ROWS_OF_X = 4
"""Rows of x that are multiplied together."""
LANES = 8
"""int32 of a register: a row of W has so many sums."""


@dataclass(frozen=True)
class WordProduct:
    """What a kernel is compiled for."""

    instructions: Instructions
    code_bytes: int
    """1 or 2."""
    coordinates: int
    """Weights of a code."""
    planes: int
    """1 or 2."""
    largest: int
    """The largest magnitude that is multiplied, of any plane."""
    rows: int
    """Rows of x."""

    @property
    def key(self) -> str:
        """The fields as a text, a constant for the compiler."""
        return "/".join(map(str, vars(self).values()))

    @classmethod
    def of(cls, key: str) -> "WordProduct":
        instructions, *numbers = key.split("/")
        return cls(instructions, *map(int, numbers))  # type: ignore[arg-type]

    @property
    def width(self) -> int:
        """Words of an entry of a table: 4, or a multiple of 8."""
        return entry_words(self.coordinates)

    @property
    def codes_together(self) -> int:
        """Codes of a register."""
        return 4 if self.width == 4 else 2

    @property
    def rows_of_x(self) -> int:
        return min(self.rows, ROWS_OF_X)

    @property
    def lanes(self) -> int:
        return LANES if self.instructions == "avx2" else 1

    @property
    def most_tiles(self) -> int:
        """Tiles that sums of int32 are safe for."""
        words = CODES * self.width // self.lanes
        return ((1 << 31) - 1) // (words * self.largest * LARGEST)

    def row_kernel(self) -> RowKernel:
        return RowKernel(
            add_up=sum_words if self.instructions == "avx2" else _sum_portably(self),
            key=self.key,
            rows=self.rows,
            rows_together=self.rows_of_x,
            planes=self.planes,
            is_bytes=False,
            lanes=self.lanes,
            most_tiles=self.most_tiles,
            tile_bytes=CODES * self.code_bytes,
            step_bytes=2 * CODES * self.coordinates,
        )

    @property
    def operand(self) -> Operand:
        return Operand(
            step_weights=2, is_bytes=False, rows=self.rows, factors=(1.0, 1.0), offsets=(0.0, 0.0)
        )


def entry_words(coordinates: int) -> int:
    """Words of an entry of a table."""
    return 4 if coordinates <= 4 else 8 * -(-coordinates // 8)


def table_of(entries: list[Tensor]) -> Tensor:
    """A table for each byte of a code, the lowest one first: int16 [bytes, 256, words].

    Args:
        entries: integers of 16 bits [at most 256, coordinates].
    """
    coordinates = entries[0].shape[1]
    table = torch.zeros(len(entries), 256, entry_words(coordinates), dtype=torch.int16)
    for own, given in zip(table, entries, strict=True):
        own[: len(given), :coordinates] = given
    return table


@intrinsic(prefer_literal=True)
def sum_words(
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
    """Sums of 8 rows of W, as `code_rows.RowKernel.add_up` says, with AVX2."""
    product = WordProduct.of(key.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, stride, last_row, num_tiles, operand, apart, out, table = arguments[1:]
        v = Vectors(builder, product.instructions)
        rows = code_rows.addresses(v, codes, stride, last_row)
        later = code_rows.ahead(v, codes, stride)
        x = [v.step(operand, apart, n) for n in range(product.rows_of_x)]
        together = max(1, min(4, SUMS // (len(x) * product.planes)))
        for first in range(0, ROWS, together):
            own = _Rows(product, v, table, first, rows[first : first + together])
            own.add_up(later, num_tiles, x, out)
        return context.get_dummy_value()

    return code_rows.signature(key), generate


@dataclass(frozen=True)
class _Rows:
    """Writes the sums of some rows of W."""

    product: WordProduct
    v: Vectors
    table: Value
    first: int
    rows: list[Value]

    def add_up(self, later: Value, num_tiles: Value, x: list[Value], out: Value) -> None:
        product, v, b = self.product, self.v, self.v.b
        planes, number = product.planes, len(self.rows)
        sums = [[v.zeros(len(x)) for _ in self.rows] for _ in range(planes)]
        block = CODES * product.code_bytes * number
        ahead = b.add(later, b.mul(num_tiles, v.int64(self.first // number * block)))

        def tile(t: Value) -> None:
            at = b.mul(t, v.int64(CODES * product.code_bytes))
            rows = [b.add(row, at) for row in self.rows]
            x_at = b.mul(t, v.int64(2 * CODES * product.coordinates))
            own_x = [b.add(part, x_at) for part in x]
            for line in range(0, block, 64):
                v.prefetch(ahead, b.add(b.mul(t, v.int64(block)), v.int64(line)))
            for code in range(0, CODES, product.codes_together):
                places = [self._entries(row, code) for row in rows]
                for piece in range(0, product.width, 8):
                    operands = [self._words_of_x(part, code, piece) for part in own_x]
                    for r, place in enumerate(places):
                        for plane, weights in enumerate(self._weights(place, piece)):
                            for total, words in zip(sums[plane][r], operands, strict=True):
                                sum = v.add_word_products(b.load(total), weights, words)
                                b.store(sum, total)

        v.loop(num_tiles, tile)
        for plane in range(planes):
            for r in range(number):
                for n, total in enumerate(sums[plane][r]):
                    place = (plane * len(x) + n) * ROWS + self.first + r
                    v.store(b.load(total), out, 4 * LANES * place)

    def _entries(self, row: Value, code: int) -> list[list[Value]]:
        """Where the entries of the codes of a register are, a list for each byte of a code."""
        product, v, b = self.product, self.v, self.v.b
        number, size = product.codes_together, product.code_bytes
        kind = ir.IntType(8 * number * size)
        bits = b.zext(v.load(row, code * size, kind), INT64)
        entry = 2 * product.width
        found = []
        for byte in range(size):
            base = b.add(self.table, v.int64(256 * entry * byte))
            places = []
            for i in range(number):
                index = b.and_(b.lshr(bits, v.int64(8 * (size * i + byte))), v.int64(255))
                places.append(b.add(base, b.mul(index, v.int64(entry))))
            found.append(places)
        return found

    def _weights(self, places: list[list[Value]], piece: int) -> list[Value]:
        """A register of weights, the upper bytes and the lower ones if there are two planes."""
        v, b = self.v, self.v.b
        words = None
        for own in places:
            found = v.side_by_side(own, 2 * piece)
            words = found if words is None else b.xor(words, found)
        if self.product.planes == 1:
            return [words]
        upper = b.ashr(words, ir.Constant(v.words, [8] * 16))
        return [upper, b.and_(words, ir.Constant(v.words, [255] * 16))]

    def _words_of_x(self, part: Value, code: int, piece: int) -> Value:
        product, v = self.product, self.v
        if product.coordinates == product.width and product.width <= 8:
            return v.load(part, 2 * code * product.coordinates, v.words)
        first = [code + i for i in range(product.codes_together)]
        return v.side_by_side(
            [v.b.add(part, v.int64(2 * product.coordinates * i)) for i in first], 2 * piece
        )


@cache
def _sum_portably(product: WordProduct) -> Callable[..., None]:
    """`sum_words` without vectors."""
    size, width, coordinates = product.code_bytes, product.width, product.coordinates
    planes, number = product.planes, product.rows_of_x

    @njit()
    def sum_words(
        key: str,
        codes: int,
        stride: int,
        last_row: int,
        num_tiles: int,
        operand: int,
        apart: int,
        out: int,
        table: int,
    ) -> None:
        tables = numba.carray(memory.pointer(table), (size, 256, width), np.int16)
        sums = numba.carray(memory.pointer(out), (planes, number, ROWS), np.int32)
        weights = np.empty(coordinates, np.int16)
        sums[:] = 0
        for r in range(last_row + 1):
            own = numba.carray(
                memory.pointer(codes + r * stride), (CODES * num_tiles, size), np.uint8
            )
            for j in range(CODES * num_tiles):
                for i in range(coordinates):
                    weights[i] = tables[0, own[j, 0], i]
                for byte in range(1, size):
                    for i in range(coordinates):
                        weights[i] ^= tables[byte, own[j, byte], i]
                for n in range(number):
                    at = operand + n * apart + 2 * coordinates * j
                    x = numba.carray(memory.pointer(at), (coordinates,), np.int16)
                    if planes == 1:
                        for i in range(coordinates):
                            sums[0, n, r] += np.int32(weights[i]) * np.int32(x[i])
                    else:
                        for i in range(coordinates):
                            sums[0, n, r] += np.int32(weights[i] >> 8) * np.int32(x[i])
                            sums[1, n, r] += np.int32(weights[i] & 255) * np.int32(x[i])

    return sum_words
