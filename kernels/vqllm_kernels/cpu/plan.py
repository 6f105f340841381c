"""One call of compiled code for linears of one input, and what it is told besides x and y.

A small product takes 10 microseconds. So what does not change from call to call is one block of
numbers, whose address is all that is handed over, and threads start once for all products.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqllm_kernels.compiled import entry, njit, numba
from vqllm_kernels.cpu import activations, chains, memory, threads
from vqllm_kernels.cpu.activations import NUM_ARGUMENTS, Operand
from vqllm_kernels.cpu.chains import NUM_CHAIN, Chain
from vqllm_kernels.cpu.parts import Member

NUM_HEAD = 8
"""int64 of `Plan.numbers` that say how many there are of what follows."""
NUM_OPERAND = 8
"""int64 of an operand; the last four are float64."""
NUM_PART = 14 + NUM_CHAIN
"""int64 of a part; the one before its chain is a float64."""
SPARE = 8
"""int32 behind the operands, which a kernel reads with a register and multiplies by 0."""
FIRST = 4096
"""Bytes of codes that are asked for while x is transformed."""


@dataclass(frozen=True)
class Plan:
    """What `multiply` is given besides x and y."""

    rows: int
    """Rows of x that its kernels are compiled for."""
    weights: int
    """Of all parts."""
    numbers: NDArray[np.int64]
    """Head, chain of the input, operands, parts."""
    address: int

    @classmethod
    def of(cls, input: Chain, members: Sequence[Member], rows: int) -> "Plan":
        operands: list[Operand] = []
        parts: list[list[int]] = []
        for number, member in enumerate(members):
            for part in member.parts:
                product = part.product(rows)
                if product.operand not in operands:
                    operands.append(product.operand)
                tile_rows, tile_cols = part.tile
                parts.append(
                    [
                        number,
                        operands.index(product.operand),
                        product.address,
                        part.codes.data_ptr(),
                        -(-member.rows // tile_rows),
                        -(-member.cols // tile_cols),
                        tile_rows,
                        part is member.parts[0],
                        part is member.parts[-1],
                        member.rows,
                        0 if product.table is None else product.table.data_ptr(),
                        part.codes.nbytes,
                        0,
                        _bits(part.scale),
                        *member.output.numbers(),
                    ]
                )
        # x is padded to whole tiles of every part.
        padded = max(-(-m.cols // p.tile[1]) * p.tile[1] for m in members for p in m.parts)
        head = [
            rows,
            len(operands),
            len(parts),
            padded,
            max(o.parts * (padded // o.step_weights) for o in operands) + SPARE,
            max(member.rows for member in members),
            sum(rows * p[4] * p[6] for p in parts),
            _every(),
        ]
        of_operands = [
            [
                o.parts,
                o.step_weights,
                o.is_bytes,
                o.plane_columns,
                *map(_bits, o.factors + o.offsets),
            ]
            for o in operands
        ]
        flat = [head, input.numbers(), *of_operands, *parts]
        numbers = np.concatenate([np.array(own, np.int64) for own in flat])
        weights = sum(member.rows * member.cols * len(member.parts) for member in members)
        return cls(rows, weights, numbers, numbers.ctypes.data)


def _bits(value: float) -> int:
    """A float64 as an int64 of the same bits."""
    return int(np.float64(value).view(np.int64))


def multiply(
    plan: int, x: int, num_rows: int, is_bfloat16: bool, num_threads: int, addresses: int
) -> bool:
    """Fills the y at the addresses. Returns whether x was finite.

    Args:
        plan: address of `Plan.numbers`.
        x: address of [num_rows, cols], bfloat16 or float32.
        addresses: address of int64, the address of [num_rows, rows] of every member.
    """
    numbers = array("q", (plan, x, num_rows, is_bfloat16, num_threads, addresses))
    _function()(numbers.buffer_info()[0])
    return numbers[0] != 0


@cache
def _function() -> Callable[[int], None]:
    """`_multiply` as a C function, which is loaded without numba where it was compiled before."""
    threads.available()

    def multiply(pointer: Any) -> None:
        a = numba.carray(pointer, (6,))
        a[0] = _multiply(a[0], a[1], a[2], a[3] != 0, a[4], a[5])

    return memory.C_FUNCTION(entry(multiply))


@njit()
def _multiply(
    plan: int, x: int, num_rows: int, is_bfloat16: bool, num_threads: int, addresses: int
) -> bool:
    """`multiply`."""
    head = numba.carray(memory.pointer(plan), (NUM_HEAD,), np.int64)
    rows, num_operands, num_parts, padded, num_words, most_rows, num_y = head[:7]
    input = numba.carray(memory.pointer(plan + 8 * NUM_HEAD), (NUM_CHAIN,), np.int64)
    place = plan + 8 * (NUM_HEAD + NUM_CHAIN)
    operands = numba.carray(memory.pointer(place), (num_operands, NUM_OPERAND), np.int64)
    constants = numba.carray(memory.pointer(place), (num_operands, NUM_OPERAND), np.float64)
    place += 8 * num_operands * NUM_OPERAND
    parts = numba.carray(memory.pointer(place), (num_parts, NUM_PART), np.int64)
    scales = numba.carray(memory.pointer(place), (num_parts, NUM_PART), np.float64)
    for i in range(num_parts):
        for line in range(0, min(FIRST // num_parts, parts[i, 11]), 64):
            memory.prefetch(parts[i, 3] + line)
    cols = input[0]
    x_NC = np.empty((num_rows, cols), np.float32)
    chains.read(x, is_bfloat16, x_NC)
    spare = np.empty(max(cols, most_rows), np.float32)
    for n in range(num_rows):
        chains.through(x_NC[n], input, spare)
    words = np.empty((num_operands, num_words), np.int32)
    of_row = np.zeros((num_operands, 2, rows), np.float64)
    factors = np.empty(2, np.float32)
    for k in range(num_operands):
        o = operands[k]
        factors[0], factors[1] = constants[k, 4], constants[k, 5]
        is_finite = activations.round_rows(
            x_NC,
            factors,
            constants[k, 6:8],
            o[1],
            o[2] != 0,
            o[3],
            # Not reshaped: what numba calls for that is not loaded without numba.
            numba.carray(memory.pointer(words[k].ctypes.data), (o[0], padded // o[1]), np.int32),
            of_row[k, 0],
            of_row[k, 1],
        )
        if not is_finite:
            return False
    arguments = np.empty((num_parts, NUM_ARGUMENTS), np.int64)
    calls = np.empty((num_parts + 1, 2), np.int64)
    of_part = np.empty((num_parts, 2, rows), np.float64)
    y_flat = np.empty(num_y, np.float32)
    y = y_flat.ctypes.data
    for i in range(num_parts):
        p, a = parts[i], arguments[i]
        for n in range(rows):
            of_part[i, 0, n] = of_row[p[1], 0, n] * scales[i, 13]
            of_part[i, 1, n] = of_row[p[1], 1, n]
        a[0], a[1], a[2] = num_threads, p[4], p[5]
        a[3], a[4] = p[3], words[p[1]].ctypes.data
        a[5] = 4 * (padded // operands[p[1], 1])
        a[6], a[7], a[8], a[9] = y, of_part[i].ctypes.data, p[10], p[9]
        y += 4 * rows * p[4] * p[6]
        calls[i + 1, 0], calls[i + 1, 1] = p[2], a.ctypes.data
    calls[0, 0] = num_parts
    if num_threads > 1:
        threads.run(head[7], calls.ctypes.data, num_threads)
    else:
        for i in range(num_parts):
            memory.call(calls[i + 1, 0], calls[i + 1, 1])
    _add_and_write(parts, arguments, num_rows, rows, spare, is_bfloat16, addresses)
    # Arrays whose addresses only are used live until they are named for the last time.
    return len(words) + len(of_part) + len(y_flat) + len(calls) > 0


@njit()
def _add_and_write(
    parts: NDArray[np.int64],
    arguments: NDArray[np.int64],
    num_rows: int,
    rows: int,
    spare: NDArray[np.float32],
    is_bfloat16: bool,
    addresses: int,
) -> None:
    """The sums of the parts of each member, through its transforms, to where they belong."""
    ys = numba.carray(memory.pointer(addresses), (len(parts),), np.int64)
    first = 0
    for i in range(len(parts)):
        p = parts[i]
        if p[7] != 0:
            first = i
        total = _sums(parts[first], arguments[first], rows)[:num_rows, : p[9]]
        if i > first:
            further = _sums(p, arguments[i], rows)
            for n in range(num_rows):
                for r in range(p[9]):
                    total[n, r] += further[n, r]
        if p[8] != 0:
            for n in range(num_rows):
                chains.through(total[n], p[14:], spare)
            chains.write(total, is_bfloat16, ys[p[0]])


@njit()
def _sums(part: NDArray[np.int64], argument: NDArray[np.int64], rows: int) -> NDArray[np.float32]:
    shape = (rows, part[4] * part[6])
    return numba.carray(memory.pointer(argument[6]), shape, np.float32)


@cache
def _every() -> int:
    """The address of a C function that calls others with one argument each: int64 [1 + n, 2] are
    n, nothing, and then the address of each and that of its argument. Every thread of a team calls
    all, which take a share of the work each."""
    threads.available()

    def call(pointer: Any) -> None:
        number = numba.carray(pointer, (2,))[0]
        own = numba.carray(pointer, (2 * number + 2,))
        for i in range(1, number + 1):
            memory.call(own[2 * i], own[2 * i + 1])

    return entry(call)
