"""Scales and Hadamard transforms of rows of float32, compiled, on one thread.

A transform of order B = m p, p a power of two, is a dense matrix of order m beside Sylvester's of
order p (`vqllm_kernels.hadamard.matrices`). The latter is done by additions alone, from 16 values
on in registers, whatever the processor. A product and its sum are rounded once or twice, but alike
on every processor.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numpy.typing import NDArray

from vqllm_kernels.compiled import cgutils, intrinsic, njit, types
from vqllm_kernels.hadamard import matrices

WIDTH = 16
"""Values of a register: two or four of the processor's own, where those are smaller."""
ROWS = 4
"""Rows of the dense factor that share what is loaded."""

_FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
_INTS = ir.VectorType(ir.IntType(32), WIDTH)


@dataclass(frozen=True)
class Order:
    """A transform of one order, as it is computed."""

    twos: int
    """p"""
    core: NDArray[np.float32]
    """The other factors, orthonormal, [m, m]."""
    norm: float
    """1 / √p, which is left to a factor of x or y."""

    @property
    def size(self) -> int:
        return self.twos * len(self.core)


@cache
def order(size: int) -> Order:
    """The transform of `size` features."""
    sizes = matrices.factors(size)
    last = sizes[-1]
    twos = last if last & (last - 1) == 0 else 1
    rest = sizes[:-1] if twos > 1 else tuple(s for s in sizes if s > 1)
    core = matrices.kronecker(rest).to(torch.float32).numpy()
    return Order(twos, np.ascontiguousarray(core), twos**-0.5)


@njit()
def transform(
    v: NDArray[np.float32],
    twos: int,
    core: NDArray[np.float32],
    transpose: bool,
    spare: NDArray[np.float32],
) -> None:
    """Q v √p in blocks, in place; Qᵀ v √p with `transpose`.

    Args:
        v: [features], a multiple of the order.
        core: [m, m].
        spare: at least [order], overwritten.
    """
    m = len(core)
    block = m * twos
    for start in range(0, len(v), block):
        own = v[start : start + block]
        if twos >= WIDTH:
            for a in range(m):
                add_and_subtract(own[a * twos :].ctypes.data, twos)
        else:
            _few(own, twos)
        if m > 1:
            _mix(own, twos, core, transpose, spare)


@njit()
def _few(v: NDArray[np.float32], twos: int) -> None:
    """Sylvester's transform of runs of fewer than 16 values."""
    h = 1
    while h < twos:
        for i in range(0, len(v), 2 * h):
            for k in range(i, i + h):
                a, b = v[k], v[k + h]
                v[k], v[k + h] = a + b, a - b
        h *= 2


@njit()
def _mix(
    v: NDArray[np.float32],
    twos: int,
    core: NDArray[np.float32],
    transpose: bool,
    spare: NDArray[np.float32],
) -> None:
    """The dense factor across runs of `twos` values."""
    m = len(core)
    for i in range(m * twos):
        spare[i] = v[i]
    along, down = (m, 1) if transpose else (1, m)
    if twos >= WIDTH:
        for a in range(0, m - m % ROWS, ROWS):
            multiply_rows(
                ROWS,
                v[a * twos :].ctypes.data,
                spare.ctypes.data,
                core.ctypes.data + 4 * a * down,
                twos,
                m,
                4 * along,
                4 * down,
            )
        for a in range(m - m % ROWS, m):
            multiply_rows(
                1,
                v[a * twos :].ctypes.data,
                spare.ctypes.data,
                core.ctypes.data + 4 * a * down,
                twos,
                m,
                4 * along,
                4 * down,
            )
        return
    for a in range(m):
        own = v[a * twos : (a + 1) * twos]
        own[:] = 0
        for k in range(m):
            h = core[k, a] if transpose else core[a, k]
            other = spare[k * twos : (k + 1) * twos]
            for b in range(twos):
                own[b] += h * other[b]


@intrinsic(prefer_literal=True)
def multiply_rows(
    typing_context: Any,
    rows: Any,
    out: Any,
    values: Any,
    core: Any,
    twos: Any,
    m: Any,
    along: Any,
    down: Any,
):
    """out[a, b] = Σ_k core[a, k] values[k, b] for a few rows a, each product and sum rounded once.

    Args:
        rows: a constant.
        out, values: addresses of float32 [.., twos], a multiple of 16.
        core: address of the first of the rows.
        m: the number of k.
        along, down: bytes from one k to the next, and from one row to the next.
    """
    number = rows.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, values, core, twos, m, along, down = arguments[1:]
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), "llvm.fma.v16f32"
        )
        four = ir.Constant(twos.type, 4)
        line = builder.mul(twos, four)

        def at(start: Any, *offsets: Any, kind: Any = _FLOATS) -> Any:
            for offset in offsets:
                start = builder.add(start, offset)
            return builder.inttoptr(start, kind.as_pointer())

        zero = ir.Constant(twos.type, 0)
        with cgutils.for_range_slice(
            builder, zero, twos, ir.Constant(twos.type, WIDTH), twos.type
        ) as (b, _):
            place = builder.mul(b, four)
            sums = [
                cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, [0.0] * WIDTH))
                for _ in range(number)
            ]
            for total in sums:
                builder.store(ir.Constant(_FLOATS, [0.0] * WIDTH), total)
            with cgutils.for_range(builder, m) as loop:
                value = builder.load(at(values, builder.mul(loop.index, line), place), align=4)
                column = builder.mul(loop.index, along)
                for a, total in enumerate(sums):
                    below = builder.mul(down, ir.Constant(down.type, a))
                    h = builder.load(at(core, column, below, kind=ir.FloatType()), align=4)
                    empty = ir.Constant(_FLOATS, ir.Undefined)
                    h = builder.insert_element(empty, h, ir.Constant(ir.IntType(32), 0))
                    h = builder.shuffle_vector(h, empty, ir.Constant(_INTS, [0] * WIDTH))
                    builder.store(builder.call(fma, [h, value, builder.load(total)]), total)
            for a, total in enumerate(sums):
                below = builder.mul(line, ir.Constant(line.type, a))
                builder.store(builder.load(total), at(out, below, place), align=4)
        return context.get_dummy_value()

    address, size = types.uintp, types.intp
    signature = types.void(rows, address, address, address, size, size, size, size)
    return signature, generate


@intrinsic
def add_and_subtract(typing_context: Any, address: Any, size: Any):
    """Sylvester's transform of float32 [size] in place; `size` is a power of two from 16 on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, size = arguments
        start = builder.inttoptr(address, _FLOATS.as_pointer())
        registers = builder.lshr(size, ir.Constant(size.type, 4))

        def place(i: Any) -> Any:
            return builder.gep(start, [i])

        with cgutils.for_range(builder, registers) as loop:
            value = builder.load(place(loop.index), align=4)
            for h in (1, 2, 4, 8):
                value = _butterfly(builder, value, h)
            builder.store(value, place(loop.index), align=4)
        # Then whole registers, h apart, for h = 1, 2, 4 .. of them.
        apart = cgutils.alloca_once_value(builder, ir.Constant(size.type, 1))
        condition = builder.append_basic_block("levels")
        body = builder.append_basic_block("level")
        end = builder.append_basic_block("done")
        builder.branch(condition)
        builder.position_at_end(condition)
        builder.cbranch(builder.icmp_unsigned("<", builder.load(apart), registers), body, end)
        builder.position_at_end(body)
        h = builder.load(apart)
        twice = builder.shl(h, ir.Constant(size.type, 1))
        with (
            cgutils.for_range_slice(
                builder, ir.Constant(size.type, 0), registers, twice, size.type
            ) as (first, _),
            cgutils.for_range(builder, h) as inner,
        ):
            low = place(builder.add(first, inner.index))
            high = place(builder.add(builder.add(first, inner.index), h))
            a, b = builder.load(low, align=4), builder.load(high, align=4)
            builder.store(builder.fadd(a, b), low, align=4)
            builder.store(builder.fsub(a, b), high, align=4)
        builder.store(twice, apart)
        builder.branch(condition)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(types.uintp, types.intp), generate


def _butterfly(builder: Any, value: Any, h: int) -> Any:
    """a + b where bit h of the place is 0, a - b where it is 1, b the value at the other place."""
    other = builder.shuffle_vector(value, value, ir.Constant(_INTS, [i ^ h for i in range(WIDTH)]))
    signs = ir.Constant(_INTS, [1 << 31 if i & h else 0 for i in range(WIDTH)])
    turned = builder.bitcast(builder.xor(builder.bitcast(value, _INTS), signs), _FLOATS)
    return builder.fadd(other, turned)
