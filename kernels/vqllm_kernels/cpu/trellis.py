"""Kernels of trellis tiles, compiled by numba: products with 1 to 16 rows of x, and panels of W."""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vqllm_kernels.compiled import entry, intrinsic, njit, numba, types
from vqllm_kernels.cpu import memory, nibbles, threads
from vqllm_kernels.cpu.activations import NUM_ARGUMENTS, NUM_PANEL_ARGUMENTS, Operand
from vqllm_kernels.cpu.byte_sums import ByteSums
from vqllm_kernels.cpu.instructions import Instructions
from vqllm_kernels.cpu.nibbles import Nibbles
from vqllm_kernels.cpu.parities import Parities
from vqllm_kernels.cpu.parts import Part, Product
from vqllm_kernels.cpu.sums import add_sums, bfloat16, scale_sums
from vqllm_kernels.cpu.tiles import PARITIES, TileEmitter, TileProduct
from vqllm_kernels.cpu.vectors import Value, Vectors
from vqllm_kernels.kernels import Tensors
from vqllm_kernels.trellis import reference, reference_v2, reference_v3

if TYPE_CHECKING:
    from vqllm_kernels.trellis.spec import ParityTrellisSpec, PlacedTrellisSpec, TrellisSpec

    Spec = TrellisSpec | ParityTrellisSpec | PlacedTrellisSpec


def part(spec: "Spec", tensors: Tensors, instructions: Instructions) -> Part:
    """The codes of a linear with their kernels."""
    scale = float(tensors["scale"])
    table = _table(_product(spec, instructions, 1), tensors.get("table"))

    def product(rows: int) -> Product:
        own = _product(spec, instructions, rows)
        return Product(kernel(own), operand(own), table)

    one = _product(spec, instructions, 1)
    return Part(
        codes=tensors["codes"],
        tile=spec.tile,
        scale=scale,
        product=product,
        panel=lambda: panel_kernel(one),
        panel_numbers=panel_numbers(one, scale),
        table=panel_table(one, scale, table),
    )


def _product(spec: "Spec", instructions: Instructions, rows: int) -> TileProduct:
    masks = getattr(spec, "masks", ())
    sizes = spec.tile_rows, spec.tile_bits, spec.state_bits
    return TileProduct(instructions, spec.code, *sizes, rows, masks, getattr(spec, "places", ()))


def _table(product: TileProduct, stored: Tensor | None) -> Tensor | None:
    """What the kernels look up: the entries of gf2; without vectors, the weights of all states."""
    if product.instructions == "portable":
        states = torch.arange(1 << product.state_bits)
        if product.code == PARITIES:
            assert stored is not None
            return reference_v2.values(product.masks, product.state_bits, stored).to(torch.int16)
        return reference.byte_sums(product.code, states).to(torch.int16).contiguous()
    if stored is None:
        return None
    missing = 64 - stored.numel()
    flat = stored.flatten().contiguous()
    flat = torch.nn.functional.pad(flat, (0, missing)) if missing > 0 else flat
    return flat if product.instructions == "avx512" else nibbles.table(flat)


def operand(product: TileProduct) -> Operand:
    """What the kernel wants in place of x."""
    extra = _extra(product)
    if product.code == PARITIES:
        factors, means = (1.0, 1.0), (0.0, 0.0)
    else:
        moments = _moments(product)
        factors = (1 / moments.deviations[0], 1 / moments.deviations[-1])
        means = (moments.means[0], moments.means[-1])
    return Operand(
        step_weights=product.operand_columns,
        is_bytes=product.is_bytes,
        rows=product.rows,
        factors=factors,
        offsets=(means[0] + extra, means[1] + extra),
    )


def _moments(product: TileProduct) -> reference.Moments:
    if product.places:
        return reference_v3.moments()
    return reference.moments_of(product.code, product.state_bits)


def _extra(product: TileProduct, is_bytes: bool | None = None) -> float:
    """By how much the weights in registers are larger than those of the code, whose bytes are
    signed."""
    if product.instructions == "portable":
        return 0.0
    if product.code == PARITIES:
        return 128.0
    bytes_of_weight = 4 // product.step_weights
    is_bytes = product.is_bytes if is_bytes is None else is_bytes
    return 128.0 * bytes_of_weight if is_bytes or product.code in reference.UNSIGNED else 0.0


def panel_numbers(product: TileProduct, scale: float) -> tuple[float, float, float, float]:
    """What the weights of even and odd columns are multiplied by, and what is added then."""
    if product.code == PARITIES:
        return scale, scale, 0.0, 0.0
    moments = _moments(product)
    extra = _extra(product, is_bytes=False)
    factors = [scale / moments.deviations[i] for i in (0, -1)]
    means = [moments.means[i] + extra for i in (0, -1)]
    return factors[0], factors[1], -factors[0] * means[0], -factors[1] * means[1]


def panel_table(product: TileProduct, scale: float, table: Tensor | None) -> Tensor | None:
    """What panels look up: with AVX-512 the bytes of each entry of gf2 in bfloat16, the low ones
    before the high ones, times the scale and rounded once as `panel_numbers` would be."""
    if table is None or product.code != PARITIES or product.instructions != "avx512":
        return table
    weights = (table.float() * scale).bfloat16()
    return weights.view(torch.uint8).view(-1, 2).T.contiguous()


@cache
def kernel(product: TileProduct) -> int:
    """The address of the product's kernel, a C function of NUM_ARGUMENTS numbers."""
    threads.available()
    key, rows, parts = product.key, product.rows, product.parts
    tile_rows, tile_bytes = product.tile_rows, product.tile_bytes
    step_bytes, most, is_bytes = 4 * product.steps, product.most_tiles, product.is_bytes
    add_up = sum_tiles if product.instructions != "portable" else _sum_portably(product)

    def multiply(pointer: Any) -> None:
        a = numba.carray(pointer, (NUM_ARGUMENTS,))
        row_tiles, num_tiles = a[1], a[2]
        codes, x, apart, out, table = a[3], a[4], a[5], a[6], a[8]
        of_row = numba.carray(memory.pointer(a[7]), (2, rows), np.float64)
        y = numba.carray(memory.pointer(out), (rows, row_tiles * tile_rows), np.float32)
        me = threads.number() if a[0] > 1 else 0
        found = np.empty((parts, tile_rows), np.int32)
        totals = np.empty((rows, tile_rows), np.int64)
        for i in range(row_tiles * me // a[0], row_tiles * (me + 1) // a[0]):
            totals[:] = 0
            for j in range(0, num_tiles, most):
                add_up(
                    key,
                    codes + (i * num_tiles + j) * tile_bytes,
                    min(most, num_tiles - j),
                    x + j * step_bytes,
                    apart,
                    found.ctypes.data,
                    table,
                )
                add_sums(found, is_bytes, totals)
            scale_sums(totals, of_row, i * tile_rows, y)

    return entry(multiply)


@cache
def panel_kernel(product: TileProduct) -> int:
    """The address of a C function of NUM_PANEL_ARGUMENTS numbers that decodes rows of tiles."""
    threads.available()
    key, tile_rows, tile_bytes = product.key, product.tile_rows, product.tile_bytes
    tile_cols = product.tile_cols
    decode = decode_tile if product.instructions != "portable" else _decode_portably(product)

    def decode_rows(pointer: Any) -> None:
        a = numba.carray(pointer, (NUM_PANEL_ARGUMENTS,))
        first, stop, num_tiles = a[1], a[2], a[3]
        codes, out, apart, numbers, table = a[4], a[5], a[6], a[7], a[8]
        me = threads.number() if a[0] > 1 else 0
        for j in range(num_tiles * me // a[0], num_tiles * (me + 1) // a[0]):
            for i in range(first, stop):
                decode(
                    key,
                    codes + (i * num_tiles + j) * tile_bytes,
                    out + j * tile_cols * apart + (i - first) * tile_rows * 2,
                    apart,
                    numbers,
                    table,
                )

    return entry(decode_rows)


@intrinsic(prefer_literal=True)
def sum_tiles(
    typing_context: Any,
    key: Any,
    codes: Any,
    num_tiles: Any,
    operand: Any,
    apart: Any,
    out: Any,
    table: Any,
):
    """Sums of the rows of one row of tiles, over tiles that lie one behind the other.

    Args:
        key: a constant, of a `TileProduct`.
        codes: address of the tiles, uint8 [num_tiles, tile_bytes].
        operand: address of int32 [parts, .., steps of num_tiles].
        apart: bytes from one part to the next.
        out: address of int32 [parts, tile_rows].
        table: address of what the code looks up, or 0.
    """
    product = TileProduct.of(key.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, num_tiles, operand, apart, out, table = arguments[1:]
        emit = _emitter(product, builder, table)
        parts = [emit.v.step(operand, apart, part) for part in range(product.parts)]
        emit.sums(codes, num_tiles, parts, out)
        return context.get_dummy_value()

    address, size = types.uintp, types.intp
    return types.void(key, address, size, address, size, address, address), generate


@intrinsic(prefer_literal=True)
def decode_tile(
    typing_context: Any, key: Any, tile: Any, out: Any, apart: Any, numbers: Any, table: Any
):
    """The weights of a tile in bfloat16, one column behind the other.

    Args:
        key: a constant, of a `TileProduct`; the rows of x do not matter.
        tile: address of the codes.
        out: address of the first column.
        apart: bytes from one column to the next.
        numbers: address of float32 [4], those of `panel_numbers`.
        table: address of what the code looks up, or 0.
    """
    product = TileProduct.of(key.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, out, apart, numbers, table = arguments[1:]
        _emitter(product, builder, table).decode(tile, out, apart, numbers)
        return context.get_dummy_value()

    address = types.uintp
    return types.void(key, address, address, types.intp, address, address), generate


def _emitter(product: TileProduct, builder: Value, table: Value) -> TileEmitter:
    kind = ByteSums
    if product.code == PARITIES:
        kind = Parities if product.instructions == "avx512" else Nibbles
    return kind(product, Vectors(builder, product.instructions), table)


@cache
def _sum_portably(product: TileProduct) -> Callable[..., None]:
    """`sum_tiles` without vectors, for any processor: a weight takes a nanosecond or two."""
    weights = _weights_portably(product)
    tile_rows, tile_cols, tile_bytes = product.tile_rows, product.tile_cols, product.tile_bytes
    parts = product.parts

    @njit()
    def sum_tiles(
        key: str, codes: int, num_tiles: int, operand: int, apart: int, out: int, table: int
    ) -> None:
        sums = numba.carray(memory.pointer(out), (parts, tile_rows), np.int32)
        sums[:] = 0
        tile = np.empty((tile_rows, tile_cols), np.int16)
        for j in range(num_tiles):
            weights(codes + j * tile_bytes, table, tile)
            for part in range(parts):
                at = operand + part * apart + 2 * j * tile_cols
                x = numba.carray(memory.pointer(at), (tile_cols,), np.int16)
                for r in range(tile_rows):
                    total = np.int32(0)
                    for c in range(tile_cols):
                        total += np.int32(tile[r, c]) * np.int32(x[c])
                    sums[part, r] += total

    return sum_tiles


@cache
def _decode_portably(product: TileProduct) -> Callable[..., None]:
    """`decode_tile` without vectors."""
    weights = _weights_portably(product)
    tile_rows, tile_cols = product.tile_rows, product.tile_cols

    @njit()
    def decode_tile(key: str, tile: int, out: int, apart: int, numbers: int, table: int) -> None:
        f = numba.carray(memory.pointer(numbers), (4,), np.float32)
        own = np.empty((tile_rows, tile_cols), np.int16)
        weights(tile, table, own)
        value = np.empty(1, np.float32)
        for c in range(tile_cols):
            y = numba.carray(memory.pointer(out + c * apart), (tile_rows,), np.uint16)
            for r in range(tile_rows):
                # float64 holds the product: the sum is rounded once, as a fused one is.
                value[0] = np.float64(own[r, c]) * f[c & 1] + np.float64(f[2 + (c & 1)])
                y[r] = bfloat16(value.view(np.uint32)[0])

    return decode_tile


@cache
def _weights_portably(product: TileProduct) -> Callable[..., None]:
    """A function that looks up the weights of a tile, int16 [tile_rows, tile_cols]."""
    ends = np.array(product.ends, np.int64)
    V, tile_bytes, tile_cols = product.step_weights, product.tile_bytes, product.tile_cols
    state_bits = product.state_bits
    row_steps, mask = tile_cols // V, (1 << state_bits) - 1

    @njit()
    def weights(codes: int, table: int, out: Any) -> None:
        ring = numba.carray(memory.pointer(codes), (tile_bytes,), np.uint8)
        values = numba.carray(memory.pointer(table), (1 << state_bits, V), np.int16)
        for t in range(len(ends)):
            end = ends[t]
            last = (end + 7) // 8 - 1
            word = np.int64(0)
            for b in range(4):
                word |= np.int64(ring[((last - b + tile_bytes) % tile_bytes) ^ 1]) << (8 * b)
            state = (word >> ((last + 1) * 8 - end)) & mask
            for i in range(V):
                out[t // row_steps, t % row_steps * V + i] = values[state, i]

    return weights
