"""Products with the codes of e8p-v1 as they are stored.

With AVX-512 a register has the low bytes of 8 codes of each of 8 rows, another the high bytes. The
high byte leads to the magnitudes of 8 weights, two bits each, in two tables of 256 bytes. Four bits
then say what 4 w is, and all of them are parities of what was looked up and of the low byte (the
signs and the parity that shifts the point), so that a product of bits with a matrix
(vgf2p8affineqb) makes them for one coordinate of all 64 codes.

    bits 0, 1   the magnitude of 2 A is 1, 3 or 5
    bit 2       the sign; that of coordinate 0 also depends on whether the magnitudes add up to an
                odd number, which is the parity of their lower bits
    bit 3       the parity of the low byte

Else 4 w is looked up as words (`code_words`): the exclusive or of what the two bytes lead to.

Source: `vqllm_kernels.e8p.reference`.
"""

from functools import cache, partial
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from torch import Tensor

from vqllm_kernels.compiled import entry, intrinsic, numba
from vqllm_kernels.cpu import code_rows, memory, threads
from vqllm_kernels.cpu.activations import NUM_PANEL_ARGUMENTS, Operand
from vqllm_kernels.cpu.code_words import WordProduct, table_of
from vqllm_kernels.cpu.instructions import Instructions
from vqllm_kernels.cpu.parts import Part, Product
from vqllm_kernels.cpu.sums import bfloat16
from vqllm_kernels.cpu.vectors import INT32, Value, Vectors
from vqllm_kernels.e8p import reference
from vqllm_kernels.kernels import Tensors

TILE = (code_rows.ROWS, 64)
"""Rows and columns of a register of codes."""
CODE = 8
"""Weights of a code."""
TILE_BYTES = TILE[0] * TILE[1] // CODE * 2
MOST_TILES = ((1 << 31) - 1) // (16 * 4 * 255 * 128)
"""Tiles that sums of int32 are safe for, in bytes."""
LARGEST_WEIGHT = 11
"""The largest magnitude of 4 w."""


def part(tensors: Tensors, instructions: Instructions) -> Part:
    """The codes of a linear with their kernels."""
    codes = tensors["codes"]
    missing = -codes.shape[1] % CODE
    if missing:  # whole registers; x is 0 there
        codes = torch.nn.functional.pad(codes, (0, missing))
    scale = float(tensors["scale"]) / 4
    return Part(
        codes=codes.contiguous(),
        tile=TILE,
        scale=scale,
        product=_in_bytes if instructions == "avx512" else partial(_in_words, instructions),
        panel=panel_kernel,
        panel_numbers=(scale, scale, 0.0, 0.0),
        table=_codewords(),
    )


def _in_bytes(rows: int) -> Product:
    """The kernel for so many rows of x, with AVX-512."""
    own = code_rows.RowKernel(
        add_up=sum_codes,
        key=str(rows),
        rows=rows,
        rows_together=rows,
        planes=1,
        is_bytes=True,
        lanes=1,
        most_tiles=MOST_TILES,
        tile_bytes=2 * code_rows.CODES,
        step_bytes=TILE[1],
    )
    operand = Operand(
        step_weights=4,
        is_bytes=True,
        rows=rows,
        factors=(1.0, 1.0),
        offsets=(128.0, 128.0),
        plane_columns=CODE,
    )
    return Product(code_rows.kernel(own), operand, _magnitudes())


def _in_words(instructions: Instructions, rows: int) -> Product:
    own = WordProduct(
        instructions, code_bytes=2, coordinates=CODE, planes=1, largest=LARGEST_WEIGHT, rows=rows
    )
    return Product(code_rows.kernel(own.row_kernel()), own.operand, _halves())


@cache
def _halves() -> Tensor:
    """Words whose exclusive or is 4 w, of the low bytes of codes and of the high ones.

    With d = 0, 1 or 2 for the magnitudes 1, 3 and 5 of 2 A, 4 w is 4 d + 1 or 4 d + 3 where the
    sign is plus, and the bits of 4 d + 0 or 4 d + 2 inverted where it is minus. What is not 4 d
    follows from the low byte, but for the sign of coordinate 0 where the magnitudes add up to an
    odd number: the other sign inverts all but the lowest two bits.
    """
    with torch.inference_mode(False):
        every = reference.codeword_table(torch.device("cpu")).mul(4).to(torch.int16)
        low_EC = every[:256] ^ every[:1]  # of the high byte 0, less what the low byte 0 has
        high_EC = every[::256]
        return table_of([low_EC, high_EC])


@cache
def _codewords() -> Tensor:
    """4 w of all codes, int8 [65536, 8]."""
    with torch.inference_mode(False):
        every = reference.codeword_table(torch.device("cpu"))
        return (4 * every).to(torch.int8).contiguous()


@cache
def _magnitudes() -> Tensor:
    """Two bits of each coordinate, those of 0 to 3 and then those of 4 to 7: uint8 [2, 256]."""
    with torch.inference_mode(False):
        digit_EC = (reference.abs_table().int() - 1) // 2
        place = 1 << 2 * torch.arange(4)
        halves = [(digit_EC[:, i : i + 4] * place).sum(1) for i in (0, 4)]
        return torch.stack(halves).to(torch.uint8).contiguous()


def _matrix(rows: list[int]) -> int:
    """A matrix over GF(2) by its rows: the bits that add up to each bit of the result."""
    return sum(row << 8 * (7 - i) for i, row in enumerate(rows))


_LOWER_BITS = 0b01010101


def _of_magnitudes(coordinate: int) -> int:
    """From the half of the magnitudes that has the coordinate."""
    place = 2 * (coordinate % 4)
    odd = _LOWER_BITS if coordinate == 0 else 0
    return _matrix([1 << place, 2 << place, odd, 0])


def _of_signs(coordinate: int) -> int:
    """From the low byte of the code."""
    sign = 1 << coordinate
    if coordinate == 0:
        sign ^= 255
    return _matrix([0, 0, sign, 255])


_ODD_REST = _matrix([0, 0, _LOWER_BITS, 0])
"""For coordinate 0, from the other half of the magnitudes."""
_VALUES = [
    2 * (1 + 2 * (i & 3)) * (-1 if i & 4 else 1) + (-1 if i & 8 else 1) + 128 for i in range(16)
]
"""4 w + 128 by the four bits."""


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
    """Sums of 8 rows of W, as `code_rows.RowKernel.add_up` says; the key are the rows of x."""
    number = int(key.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, stride, last_row, num_tiles, operand, apart, out, table = arguments[1:]
        v = Vectors(builder, "avx512")
        b = builder
        first_rows = code_rows.addresses(v, codes, stride, last_row)
        later = code_rows.ahead(v, codes, stride)
        halves = [[v.load(table, 256 * h + 64 * i, v.bytes) for i in range(4)] for h in range(2)]
        parts = [v.step(operand, apart, part) for part in range(2 * number)]
        sums = [v.zeros(2) for _ in parts]

        def tile(t: Value) -> None:
            at = b.mul(t, v.int64(2 * CODE))
            own = [b.add(row, at) for row in first_rows]
            for line in range(0, TILE_BYTES, 64):
                v.prefetch(later, b.add(b.mul(t, v.int64(TILE_BYTES)), v.int64(line)))
            low, high = _bytes_of_codes(v, own)
            found = [code_rows.look_up_256(v, half, high) for half in halves]
            x_at = b.mul(t, v.int64(TILE[1]))
            for i in range(CODE):
                bits = v.times_matrix(found[i // 4], _of_magnitudes(i))
                bits = b.xor(bits, v.times_matrix(low, _of_signs(i)))
                if i == 0:
                    bits = b.xor(bits, v.times_matrix(found[1], _ODD_REST))
                weights = v.shuffle_of_16(_VALUES, bits)
                for total, part in zip(sums, parts):
                    x = v.spread_long(b.add(part, x_at), 8 * i)
                    place = total[i & 1]
                    b.store(v.add_bytes_products(b.load(place), weights, x), place)

        v.loop(num_tiles, tile)
        for n, total in enumerate(sums):
            code_rows.store_sums(v, total, out, n)
        return context.get_dummy_value()

    return code_rows.signature(key), generate


def _bytes_of_codes(v: Vectors, rows: list[Value]) -> tuple[Value, Value]:
    """The low and the high bytes of 8 codes of each of 8 rows."""
    pieces = [v.load(row, 0, v.quarter) for row in rows]
    while len(pieces) > 2:
        width = pieces[0].type.count * 2
        order = ir.Constant(ir.VectorType(INT32, width), list(range(width)))
        pieces = [
            v.b.shuffle_vector(pieces[i], pieces[i + 1], order) for i in range(0, len(pieces), 2)
        ]
    kind = ir.VectorType(INT32, 64)
    low, high = (
        v.b.shuffle_vector(*pieces, ir.Constant(kind, [2 * i + k for i in range(64)]))
        for k in range(2)
    )
    return low, high


@cache
def panel_kernel() -> int:
    """The address of a C function of NUM_PANEL_ARGUMENTS numbers that decodes rows of tiles."""
    threads.available()
    tile_rows = TILE[0]

    def decode_rows(pointer: Any) -> None:
        a = numba.carray(pointer, (NUM_PANEL_ARGUMENTS,))
        first, stop, num_tiles = a[1], a[2], a[3]
        codes, out, apart, numbers, table, all_rows = a[4], a[5], a[6], a[7], a[8], a[9]
        me = threads.number() if a[0] > 1 else 0
        scale = numba.carray(memory.pointer(numbers), (1,), np.float32)[0]
        points = numba.carray(memory.pointer(table), (1 << 16, CODE), np.int8)
        start, end = first * tile_rows, min(stop * tile_rows, all_rows)
        value = np.empty(1, np.float32)
        for j in range(8 * num_tiles * me // a[0], 8 * num_tiles * (me + 1) // a[0]):
            for r in range(start, end):
                at = codes + (r * 8 * num_tiles + j) * 2
                code = numba.carray(memory.pointer(at), (1,), np.uint16)[0]
                for i in range(CODE):
                    value[0] = np.float32(points[code, i]) * scale
                    place = out + (CODE * j + i) * apart + 2 * (r - start)
                    y = numba.carray(memory.pointer(place), (1,), np.uint16)
                    y[0] = bfloat16(value.view(np.uint32)[0])

    return entry(decode_rows)
