"""Tiles of a trellis whose values are sums of bytes, times 1 to 16 rows of integers.

A register holds a piece of 4 columns of 16 (or 8) rows of a tile. The windows of their states are
picked from the codes as they are stored, one multiplication makes the bytes of the values, and
products of integers sum them up. Nothing is rounded, so every set of instructions has the same
sums, and so have one row and many.

    bytes   one row, AVX-512: q = 256 hi + lo, two vpdpbusd a register, with 128 added to the
            signed bytes of the code, which costs a constant a row
    words   several rows, or AVX2: two values of a register become int16, one product a row

Source: the layout is that of `vqllm_kernels.trellis.reference`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from vqllm_kernels.cpu import memory, threads
from vqllm_kernels.cpu.activations import LARGEST, NUM_ARGUMENTS, NUM_PANEL_ARGUMENTS, Operand
from vqllm_kernels.cpu.instructions import Instructions
from vqllm_kernels.cpu.parts import Part, Product
from vqllm_kernels.cpu.vectors import Value, Vectors
from vqllm_kernels.kernels import Tensors
from vqllm_kernels.trellis import reference

if TYPE_CHECKING:
    from vqllm_kernels.trellis.spec import TrellisSpec

PIECE = 4
"""Columns of a register."""
REGISTERS = {"avx512": 16, "avx2": 8}
"""Registers for sums: about half of what there are."""
AHEAD = 4096
"""Bytes of codes that are asked for ahead: 4096 x 4096 at 2 bits out of memory takes 0.66 ms so,
0.72 with 1024 and 1.75 with 256."""


@dataclass(frozen=True)
class TrellisProduct:
    """What a kernel is compiled for."""

    instructions: Instructions
    code: str
    tile_rows: int
    tile_bits: int
    state_bits: int
    rows: int
    """Rows of x."""

    @property
    def key(self) -> str:
        """The fields as a text, a constant for the compiler."""
        return "/".join(str(value) for value in vars(self).values())

    @classmethod
    def of(cls, key: str) -> "TrellisProduct":
        instructions, code, *numbers = key.split("/")
        return cls(instructions, code, *map(int, numbers))  # type: ignore[arg-type]

    @property
    def step_weights(self) -> int:
        return reference.WEIGHTS_OF_STEP.get(self.code, 1)

    @property
    def tile_cols(self) -> int:
        return reference.WEIGHTS // self.tile_rows

    @property
    def tile_bytes(self) -> int:
        return self.tile_bits // 8

    @property
    def is_bytes(self) -> bool:
        """Whether x comes as bytes; else as words."""
        return self.instructions == "avx512" and self.rows == 1

    @property
    def parts(self) -> int:
        """Operands of a step of one tile: the high and low bytes of one row, or rows."""
        return 2 if self.is_bytes else self.rows

    @property
    def steps(self) -> int:
        """Steps of a row of a tile: one int32 of x each."""
        return self.tile_cols // self.step_weights

    @property
    def most_tiles(self) -> int:
        """Tiles that sums of int32 are safe for.

        A step adds at most 4 · 255 · 128 in bytes, and 4 · 128 · 32512 in words.
        """
        most = 4 * 255 * 128 if self.is_bytes else 4 * 128 * LARGEST
        return ((1 << 31) - 1) // (most * self.steps)

    @cached_property
    def ends(self) -> list[int]:
        return reference.step_ends(self.tile_bits, reference.WEIGHTS // self.step_weights)


@intrinsic(prefer_literal=True)
def sum_tiles(
    typing_context: Any,
    key: Any,
    codes: Any,
    num_tiles: Any,
    operand: Any,
    apart: Any,
    out: Any,
):
    """Sums of the rows of one row of tiles, over tiles that lie one behind the other.

    Args:
        key: a constant, of a `TrellisProduct`.
        codes: address of the tiles, uint8 [num_tiles, tile_bytes].
        operand: address of int32 [parts, .., steps of num_tiles].
        apart: bytes from one part to the next.
        out: address of int32 [parts, tile_rows].
    """
    product = TrellisProduct.of(key.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, num_tiles, operand, apart, out = arguments[1:]
        emit = _Emitter(product, Vectors(builder, product.instructions))
        parts = [emit.v.step(operand, apart, part) for part in range(product.parts)]
        emit.sums(codes, num_tiles, parts, out)
        return context.get_dummy_value()

    address = types.uintp
    return types.void(key, address, types.intp, address, types.intp, address), generate


@cache
def _sum_portably(product: TrellisProduct) -> Callable[..., None]:
    """`sum_tiles` without vectors, for any processor: a weight takes a nanosecond or two."""
    ends = np.array(product.ends, np.int64)
    tile_rows, tile_bytes, steps = product.tile_rows, product.tile_bytes, product.steps
    mask, parts = (1 << product.state_bits) - 1, product.parts
    multiplier = reference.MULTIPLIERS[product.code]
    addend = reference.ADDENDS.get(product.code, 0)
    pairs = product.step_weights == 2
    signed = product.code not in reference.UNSIGNED

    @numba.njit(nogil=True, cache=True)
    def sum_tiles(key: str, codes: int, num_tiles: int, operand: int, apart: int, out: int) -> None:
        sums = numba.carray(memory.pointer(out), (parts, tile_rows), np.int32)
        sums[:] = 0
        ring = numba.carray(memory.pointer(codes), (num_tiles * tile_bytes,), np.uint8)
        for j in range(num_tiles):
            for r in range(tile_rows):
                for s in range(steps):
                    end = ends[r * steps + s]
                    word = np.int64(0)
                    last = (end + 7) // 8 - 1
                    for b in range(4):
                        byte = ((last - b + tile_bytes) % tile_bytes) ^ 1
                        word |= np.int64(ring[j * tile_bytes + byte]) << (8 * b)
                    state = (word >> ((last + 1) * 8 - end)) & mask
                    values = (state * multiplier + addend) & 0xFFFFFFFF
                    first = second = np.int32(0)
                    for b in range(4):
                        byte_value = np.int32((values >> (8 * b)) & 255)
                        if signed and byte_value > 127:
                            byte_value -= np.int32(256)
                        if pairs and b & 1:
                            second += byte_value
                        else:
                            first += byte_value
                    for part in range(parts):
                        at = operand + part * apart + 4 * (j * steps + s)
                        x = numba.carray(memory.pointer(at), (2,), np.int16)
                        sums[part, r] += first * np.int32(x[0]) + second * np.int32(x[1])

    return sum_tiles


@intrinsic(prefer_literal=True)
def decode_tile(typing_context: Any, key: Any, tile: Any, out: Any, apart: Any, numbers: Any):
    """The weights of a tile in bfloat16, one column behind the other.

    Args:
        key: a constant, of a `TrellisProduct`; the rows of x do not matter.
        tile: address of the codes.
        out: address of the first column.
        apart: bytes from one column to the next.
        numbers: address of float32 [4]: what even and odd columns of sums of bytes are multiplied
            by, and what is added then.
    """
    product = TrellisProduct.of(key.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, out, apart, numbers = arguments[1:]
        _Emitter(product, Vectors(builder, product.instructions)).decode(tile, out, apart, numbers)
        return context.get_dummy_value()

    address = types.uintp
    return types.void(key, address, address, types.intp, address), generate


@cache
def _decode_portably(product: TrellisProduct) -> Callable[..., None]:
    """`decode_tile` without vectors."""
    sums = _sum_portably(product)
    tile_rows, steps, V = product.tile_rows, product.steps, product.step_weights

    @numba.njit(nogil=True, cache=True)
    def decode_tile(key: str, tile: int, out: int, apart: int, numbers: int) -> None:
        f = numba.carray(memory.pointer(numbers), (4,), np.float32)
        x = np.zeros((1, 2 * steps), np.int16)
        total = np.empty((1, tile_rows), np.int32)
        for c in range(steps * V):
            # The sums of one column: x is 1 there.
            x[:] = 0
            for i in range(2 // V):
                x[0, 2 * c // V + i] = 1
            sums(key, tile, 1, x.ctypes.data, 0, total.ctypes.data)
            y = numba.carray(memory.pointer(out + c * apart), (tile_rows,), np.uint16)
            for r in range(tile_rows):
                w = np.float32(total[0, r]) * f[c & 1] + f[2 + (c & 1)]
                y[r] = _bfloat16(w)
        if len(x) + len(total) == 0:  # both live until here
            return

    return decode_tile


@numba.njit(nogil=True, cache=True)
def _bfloat16(value: float) -> int:
    bits = np.array([value], np.float32).view(np.uint32)[0]
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@dataclass(frozen=True)
class _Emitter:
    """Writes the instructions of one kernel."""

    product: TrellisProduct
    v: Vectors

    def sums(self, codes: Value, num_tiles: Value, operand: Sequence[Value], out: Value) -> None:
        product, lanes = self.product, self.v.lanes
        groups = product.tile_rows // lanes
        pieces = product.tile_cols // PIECE
        # As many groups of rows at a time as there are registers for their sums.
        most = max(1, REGISTERS[product.instructions] // product.parts)
        step = max(1, min(groups, most))
        for first in range(0, groups, step):
            chosen = range(first, min(first + step, groups))
            apart = len(chosen) * pieces * product.parts <= REGISTERS[product.instructions]
            self._groups(codes, num_tiles, operand, out, chosen, pieces if apart else 1)

    def decode(self, tile: Value, out: Value, apart: Value, numbers: Value) -> None:
        """The weights of a tile, a column after the other."""
        product, v = self.product, self.v
        V = product.step_weights
        for line in range(0, product.tile_bytes, 64):
            v.prefetch(tile, AHEAD + line)
        factors = [v.spread_float(numbers, 4 * i) for i in range(2)]
        addends = [v.spread_float(numbers, 8 + 4 * i) for i in range(2)]
        for piece in range(product.tile_cols // PIECE):
            for group in range(product.tile_rows // v.lanes):
                for s, state in enumerate(self._states(tile, group, piece)):
                    low, high = v.word_halves(self._as_words(self._values(state)))
                    for i, value in enumerate([low, high] if V == 2 else [v.b.add(low, high)]):
                        column = piece * PIECE + s * V + i
                        weight = v.times_plus(value, factors[column & 1], addends[column & 1])
                        v.store(
                            v.as_bfloat16(weight), v.step(out, apart, column), 2 * group * v.lanes
                        )

    def _groups(
        self,
        codes: Value,
        num_tiles: Value,
        operand: Sequence[Value],
        out: Value,
        groups: Sequence[int],
        chains: int,
    ) -> None:
        """The sums of some groups of rows; with several chains, one for each piece of columns."""
        product, v = self.product, self.v
        parts, steps = product.parts, PIECE // product.step_weights
        sums = {(group, chain): v.zeros(parts) for group in groups for chain in range(chains)}

        def tile(j: Value) -> None:
            own = v.b.add(codes, v.b.mul(j, v.int64(product.tile_bytes)))
            first = v.b.mul(j, v.int64(4 * product.steps))
            x = [v.b.add(part, first) for part in operand]
            for line in range(0, product.tile_bytes, 64):
                v.prefetch(own, AHEAD + line)
            for piece in range(product.tile_cols // PIECE):
                for group in groups:
                    states = self._states(own, group, piece)
                    for s, state in enumerate(states):
                        self._add(sums[group, piece % chains], state, x, 4 * (piece * steps + s))

        v.loop(num_tiles, tile)
        for group in groups:
            for part in range(parts):
                total = v.b.load(sums[group, 0][part])
                for chain in range(1, chains):
                    total = v.b.add(total, v.b.load(sums[group, chain][part]))
                v.store(total, out, 4 * (part * product.tile_rows + group * v.lanes))

    def _states(self, tile: Value, group: int, piece: int) -> list[Value]:
        """The states of the steps of a piece of columns, a register each."""
        product, v = self.product, self.v
        steps = PIECE // product.step_weights
        mask = v.all_ints((1 << product.state_bits) - 1)
        lanes = range(v.lanes)

        def ends(s: int) -> list[int]:
            rows = [(group * v.lanes + lane) * product.steps + piece * steps for lane in lanes]
            return [product.ends[row + s] for row in rows]

        def window(last: Sequence[int]) -> Value:
            # The ring's bytes stand in words of 16 bits, the first one the high byte of its word.
            places = [
                ((-(-end // 8) - 1 - b) % product.tile_bytes) ^ 1 for end in last for b in range(4)
            ]
            return v.b.bitcast(v.pick_bytes(tile, product.tile_bytes, places), v.ints)

        last = ends(steps - 1)
        shifts = [[-(-b // 8) * 8 - a for a, b in zip(ends(s), last)] for s in range(steps)]
        shared = max(map(max, shifts)) + product.state_bits <= 32
        words = window(last) if shared else None
        states = []
        for s in range(steps):
            if words is None:
                own = ends(s)
                word, shift = window(own), [-end % 8 for end in own]
            else:
                word, shift = words, shifts[s]
            states.append(v.b.and_(v.shift_right(word, shift), mask))
        return states

    def _add(self, sums: Sequence[Value], state: Value, x: Sequence[Value], at: int) -> None:
        """Add the products of the values of a step with those of every part of x there."""
        product, v = self.product, self.v
        values = self._values(state)
        if not product.is_bytes:
            values = self._as_words(values)
        elif product.code not in reference.UNSIGNED:
            values = v.b.xor(values, v.all_ints(0x80808080))
        add = v.add_bytes_products if product.is_bytes else v.add_word_products
        for total, part in zip(sums, x):
            v.b.store(add(v.b.load(total), values, v.spread(part, at)), total)

    def _values(self, state: Value) -> Value:
        """The bytes of the values of states."""
        product, v = self.product, self.v
        values = v.b.mul(state, v.all_ints(reference.MULTIPLIERS[product.code]))
        if product.code in reference.ADDENDS:
            values = v.b.add(values, v.all_ints(reference.ADDENDS[product.code]))
        return values

    def _as_words(self, values: Value) -> Value:
        """Sums of bytes in two int16: the two values of a step, or the two halves of one."""
        if self.product.step_weights == 2:
            values = self.v.shuffle_in_words(values, (0, 2, 1, 3))
        return self.v.pair_sums(values, self.product.code not in reference.UNSIGNED)


def operand(product: TrellisProduct) -> Operand:
    """What the kernel wants in place of x."""
    moments = reference.moments_of(product.code, product.state_bits)
    # The kernel reads the bytes as unsigned where it or the code does: 128 too many for each.
    is_unsigned = product.is_bytes or product.code in reference.UNSIGNED
    extra = 128.0 * (4 // product.step_weights) if is_unsigned else 0.0
    return Operand(
        step_weights=product.step_weights,
        is_bytes=product.is_bytes,
        rows=product.rows,
        factors=(1 / moments.deviations[0], 1 / moments.deviations[-1]),
        offsets=(moments.means[0] + extra, moments.means[-1] + extra),
    )


@cache
def kernel(product: TrellisProduct) -> int:
    """The address of the kernel, a C function of the address of NUM_ARGUMENTS numbers."""
    threads.available()
    key, rows, parts = product.key, product.rows, product.parts
    tile_rows, tile_bytes = product.tile_rows, product.tile_bytes
    step_bytes, most, is_bytes = 4 * product.steps, product.most_tiles, product.is_bytes
    add_up = sum_tiles if product.instructions != "portable" else _sum_portably(product)

    @numba.cfunc(types.void(types.CPointer(types.int64)), nopython=True, cache=True)
    def multiply(pointer: Any) -> None:
        a = numba.carray(pointer, (NUM_ARGUMENTS,))
        row_tiles, num_tiles = a[1], a[2]
        codes, x, apart, out = a[3], a[4], a[5], a[6]
        of_row = numba.carray(memory.pointer(a[7]), (2, rows), np.float64)
        stride = row_tiles * tile_rows
        y = numba.carray(memory.pointer(out), (rows, stride), np.float32)
        me = threads.number() if a[0] > 1 else 0
        sums = np.empty((parts, tile_rows), np.int32)
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
                    sums.ctypes.data,
                )
                if is_bytes:
                    for r in range(tile_rows):
                        totals[0, r] += (np.int64(sums[0, r]) << 8) + sums[1, r]
                else:
                    for n in range(rows):
                        for r in range(tile_rows):
                            totals[n, r] += sums[n, r]
            for n in range(rows):
                for r in range(tile_rows):
                    y[n, i * tile_rows + r] = (totals[n, r] - of_row[1, n]) * of_row[0, n]

    return multiply.address


@cache
def panel_kernel(product: TrellisProduct) -> int:
    """The address of a C function that decodes rows of tiles, see `panels`."""
    threads.available()
    key, tile_rows, tile_bytes = product.key, product.tile_rows, product.tile_bytes
    tile_cols = product.tile_cols
    decode = decode_tile if product.instructions != "portable" else _decode_portably(product)

    @numba.cfunc(types.void(types.CPointer(types.int64)), nopython=True, cache=True)
    def decode_rows(pointer: Any) -> None:
        a = numba.carray(pointer, (NUM_PANEL_ARGUMENTS,))
        first, stop, num_tiles = a[1], a[2], a[3]
        codes, out, apart, numbers = a[4], a[5], a[6], a[7]
        me = threads.number() if a[0] > 1 else 0
        for j in range(num_tiles * me // a[0], num_tiles * (me + 1) // a[0]):
            for i in range(first, stop):
                decode(
                    key,
                    codes + (i * num_tiles + j) * tile_bytes,
                    out + j * tile_cols * apart + (i - first) * tile_rows * 2,
                    apart,
                    numbers,
                )

    return decode_rows.address


def panel_numbers(product: TrellisProduct, scale: float) -> tuple[float, float, float, float]:
    """What sums of bytes are multiplied by, and what is added, in even and in odd columns."""
    moments = reference.moments_of(product.code, product.state_bits)
    extra = 512 / product.step_weights if product.code in reference.UNSIGNED else 0
    factors = [scale / moments.deviations[i] for i in (0, -1)]
    means = [moments.means[i] + extra for i in (0, -1)]
    return factors[0], factors[1], -factors[0] * means[0], -factors[1] * means[1]


def part(spec: "TrellisSpec", tensors: Tensors, instructions: Instructions) -> Part:
    """The codes of a linear with their kernels."""

    def of(rows: int) -> TrellisProduct:
        return TrellisProduct(
            instructions, spec.code, spec.tile_rows, spec.tile_bits, spec.state_bits, rows
        )

    def product(rows: int) -> Product:
        own = of(rows)
        return Product(kernel(own), operand(own))

    scale = float(tensors["scale"])
    return Part(
        codes=tensors["codes"],
        tile=spec.tile,
        scale=scale,
        product=product,
        panel=lambda: panel_kernel(of(1)),
        panel_numbers=panel_numbers(of(1), scale),
    )
