"""The Viterbi search on the CPU with costs of 16 bits, in vectors of 32, compiled by numba.

Only best[t][g] is kept of a step: the least cost of the states that are followed by group g of
states. From one step to the next

    best[t + 1][g] = min over f of  best[t][s >> k] + error(s, x_t),    s = f·G + g

where k are the new bits of step t, and G is the number of groups after it. The way back computes
the 2^k sums of one group again, so no predecessors are noted. A float32 cost would fill the vectors
half as well, and a step costs little more than its additions.

Costs are integers, so paths are the same on every processor and with any number of threads. With
values of mean square 1, an error of 1 counts 645, from 3.25 bits a weight on 2579. Gaussian tiles
lose less than 0.1 % to that, measured at 1 to 4.5 bits (eval/bench_viterbi.py). Costs and
differences stop at 32767. A tile with a weight that does not fit is left to the search in float32,
and so is one whose path does not close, which has not been seen.

No lock is held. LLVM makes two registers of a vector where the processor has none of 512 bits.
"""

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

LANES = 32
MOST_BITS = 5
"""Most new bits of a step: the states of a group then fill one vector."""
SCALE = 6500
"""Integers of the root mean square of the values, unless some are five times as large."""
FINE_RATE = 3.25
"""Bits a weight from which on differences are doubled before they are squared."""
MOST_RATE = 4.5
"""Most bits a weight. With 5, integers of this size lose 0.4 %."""
_LIMIT = 32767
_CALM = 4
"""Steps after which costs are made small again, if the least of them is above _HIGH."""
_HIGH = 2048

_JIT: dict[str, Any] = {"nogil": True, "cache": True}
_WORD = ir.IntType(16)
_WORDS = ir.VectorType(_WORD, LANES)
_WIDE = ir.VectorType(ir.IntType(32), LANES)
_INT = ir.IntType(64)


def fits(values_SV: NDArray[np.float32], shift_T: NDArray[np.int64]) -> bool:
    """Whether a trellis has groups that fill vectors, and no more bits than costs are exact for."""
    num_states, num_weights = values_SV.shape
    most = int(shift_T.max())
    is_exact = int(shift_T.sum()) <= MOST_RATE * len(shift_T) * num_weights
    return is_exact and most <= MOST_BITS and num_states >> most >= LANES


@intrinsic
def _step(typing_context, before, after, first, second, x, y, groups, num_before, shift, fine):
    """The least costs of groups after a step, from those before it.

    Args:
        before, after: addresses of int16, the costs.
        first, second: addresses of int16 [states], the values; `second` is None where a step has
            one weight.
        x, y: the weights of the step, int16.
        groups: number of groups after the step, a multiple of LANES.
        num_before: states that are followed by one group.
        shift: new bits of the step.
        fine: None, or anything else to double the differences.
    """
    has_two = not isinstance(second, types.NoneType)
    is_fine = not isinstance(fine, types.NoneType)

    def generate(context, builder, signature, arguments):
        before, after, first, second, x, y, groups, num_before, shift, _ = arguments

        def at(start, number, kind):
            offset = builder.shl(number, _INT(1))
            return builder.inttoptr(builder.add(start, offset), kind.as_pointer())

        def splat(word):
            empty, first_lane = ir.Constant(_WORDS, ir.Undefined), _WIDE.element(0)
            vector = builder.insert_element(empty, word, first_lane)
            return builder.shuffle_vector(vector, vector, ir.Constant(_WIDE, [0] * LANES))

        def square(values, weight, states):
            loaded = builder.load(at(values, states, _WORDS), align=2)
            gap = _call(builder, "ssub.sat", loaded, weight)
            if is_fine:
                gap = _call(builder, "sadd.sat", gap, gap)
            wide = builder.sext(gap, _WIDE)
            high = builder.lshr(builder.mul(wide, wide), ir.Constant(_WIDE, [16] * LANES))
            return builder.trunc(high, _WORDS)

        weights = [splat(x), splat(y)] if has_two else [splat(x)]

        def costs(states, bits):
            # The states of a group follow each other: the cost of each is repeated.
            count = max(1, LANES >> bits)
            group = builder.lshr(states, shift)
            if count == 1:
                best = splat(builder.load(at(before, group, _WORD), align=2))
            else:
                part = ir.VectorType(_WORD, count)
                loaded = builder.load(at(before, group, part), align=2)
                places = ir.Constant(_WIDE, [i >> bits for i in range(LANES)])
                best = builder.shuffle_vector(loaded, loaded, places)
            error = square(first, weights[0], states)
            if has_two:
                error = _call(builder, "sadd.sat", error, square(second, weights[1], states))
            return _call(builder, "sadd.sat", best, error)

        def least_of_two(states, bits):
            following = costs(builder.add(states, groups), bits)
            return _call(builder, "smin", costs(states, bits), following)

        def step(bits):
            with cgutils.for_range_slice(builder, _INT(0), groups, _INT(LANES)) as (group, _):
                least = cgutils.alloca_once(builder, _WORDS)
                builder.store(least_of_two(group, bits), least)
                with cgutils.for_range_slice(builder, _INT(2), num_before, _INT(2)) as (f, _):
                    states = builder.add(group, builder.mul(f, groups))
                    found = _call(builder, "smin", builder.load(least), least_of_two(states, bits))
                    builder.store(found, least)
                builder.store(builder.load(least), at(after, group, _WORDS), align=2)

        # The number of new bits decides how costs are repeated, so each has code of its own.
        done = builder.append_basic_block("done")
        blocks = [builder.append_basic_block(f"bits{bits + 1}") for bits in range(MOST_BITS)]
        switch = builder.switch(shift, blocks[-1])
        for bits, block in enumerate(blocks, 1):
            if bits < MOST_BITS:
                switch.add_case(_INT(bits), block)
            builder.position_at_end(block)
            step(bits)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    address, number = types.uintp, types.int64
    signature = types.void(
        *(address, address, address, address if has_two else types.none, types.int16, types.int16),
        *(number, number, number, fine),
    )
    return signature, generate


@intrinsic
def _least(typing_context, costs, num):
    """The least of `num` int16 at an address; LANES divides their number."""

    def generate(context, builder, signature, arguments):
        costs, num = arguments
        least = cgutils.alloca_once_value(builder, ir.Constant(_WORDS, [_LIMIT] * LANES))
        with cgutils.for_range_slice(builder, _INT(0), num, _INT(LANES)) as (i, _):
            place = builder.add(costs, builder.shl(i, _INT(1)))
            loaded = builder.load(builder.inttoptr(place, _WORDS.as_pointer()), align=2)
            builder.store(_call(builder, "smin", builder.load(least), loaded), least)
        kind = ir.FunctionType(_WORD, [_WORDS])
        name = f"llvm.vector.reduce.smin.v{LANES}i16"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(function, [builder.load(least)])

    return types.int16(types.uintp, types.int64), generate


def _call(builder: Any, name: str, a: Any, b: Any) -> Any:
    """An operation of LLVM on two vectors of words."""
    kind = ir.FunctionType(_WORDS, [_WORDS, _WORDS])
    name = f"llvm.{name}.v{LANES}i16"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b])


@numba.njit(**_JIT)
def _error(value, weight, fine):
    """What `_step` adds for a weight."""
    gap = min(max(np.int64(value) - np.int64(weight), -_LIMIT - 1), _LIMIT)
    if fine is not None:
        gap = min(max(2 * gap, -_LIMIT - 1), _LIMIT)
    return (gap * gap) >> 16


@numba.njit(**_JIT)
def _cheapest(best_G, group, groups, num_before, shift, x_V, first, second, fine):
    """Which of the states that are followed by a group has the least cost."""
    state, least = group, np.int64(1 << 32)
    for s in range(group, num_before * groups, groups):
        cost = best_G[s >> shift] + _error(first[s], x_V[0], fine)
        if second is not None:
            cost += _error(second[s], x_V[1], fine)
        if cost < least:
            state, least = s, cost
    return state


@numba.njit(**_JIT)
def _search(x_TV, first, second, shift_T, context, fine, path_T, best_TG):
    """The path of least squared error, its states in `path_T`.

    A `context` >= 0 fixes the bits before the first step, with which the path ends too.
    """
    num_steps, num_states = len(x_TV), len(first)
    groups = num_states >> shift_T[0]
    best_TG[0, :groups] = 0
    if context >= 0:
        best_TG[0, :groups] = _LIMIT
        best_TG[0, context] = 0
    reached = 1  # states that a path from one of the first groups can be in
    for t in range(num_steps):
        # After the last step the ring goes on with the first one.
        after = shift_T[t + 1] if t + 1 < num_steps else shift_T[0]
        groups = num_states >> after
        best, new = best_TG[t].ctypes.data, best_TG[t + 1].ctypes.data
        values, num, shift = first.ctypes.data, 1 << after, shift_T[t]
        if second is None:
            _step(  # pyright: ignore[reportCallIssue]
                best, new, values, None, x_TV[t, 0], np.int16(0), groups, num, shift, fine
            )
        else:
            pair = second.ctypes.data
            _step(  # pyright: ignore[reportCallIssue]
                best, new, values, pair, x_TV[t, 0], x_TV[t, 1], groups, num, shift, fine
            )
        # Not before all states are reached: until then _LIMIT marks those that are not.
        reached = min(reached << shift, num_states)
        if reached == num_states and t % _CALM == 0:
            least = _least(new, groups)
            if least > _HIGH:
                for g in range(groups):
                    best_TG[t + 1, g] -= least
    group = context
    if context < 0:
        group = np.int64(np.argmin(best_TG[num_steps, :groups]))
    # Back from the group before which the path ends.
    for t in range(num_steps - 1, -1, -1):
        after = shift_T[t + 1] if t + 1 < num_steps else shift_T[0]
        groups, shift = num_states >> after, shift_T[t]
        state = _cheapest(
            best_TG[t], group, groups, 1 << after, shift, x_TV[t], first, second, fine
        )
        path_T[t] = state
        group = state >> shift


@numba.njit(**_JIT)
def _tail_biting(x_NTV, first, second, shift_T, num_around, fine, path_NT, best_TG):
    """Two searches for each tile: around the closing place, then of the whole ring."""
    num_tiles, num_steps, num_weights = x_NTV.shape
    # The steps around the place where the ring closes.
    order = np.empty(2 * num_around, np.int64)
    for i in range(2 * num_around):
        order[i] = (num_steps - num_around + i) % num_steps
    around_TV = np.empty((2 * num_around, num_weights), np.int16)
    around_shift_T = shift_T[order]
    around_path_T = np.empty(2 * num_around, np.int32)
    for n in range(num_tiles):
        for i in range(2 * num_around):
            around_TV[i] = x_NTV[n, order[i]]
        _search(
            around_TV, first, second, around_shift_T, np.int64(-1), fine, around_path_T, best_TG
        )
        context = np.int64(around_path_T[num_around]) >> shift_T[0]
        _search(x_NTV[n], first, second, shift_T, context, fine, path_NT[n], best_TG)
        if path_NT[n, 0] >> shift_T[0] != context:
            path_NT[n, 0] = -1


class Int16Search:
    """The search for a trellis: `values_SV` are the values of the states, float32 [2^L, V],
    `shift_T` the new bits of every step, int64, which it `fits`, `num_around` the steps on each
    side of the place where the ring closes that are searched first."""

    def __init__(
        self, values_SV: NDArray[np.float32], shift_T: NDArray[np.int64], num_around: int
    ) -> None:
        num_steps, num_weights = len(shift_T), values_SV.shape[1]
        most = max(float(np.abs(values_SV).max()), 1e-30)
        self._scale = min(SCALE / _size(values_SV), _LIMIT / most)
        words_VS = [np.rint(values_S * self._scale) for values_S in values_SV.T]
        self._first, *second = [_aligned(len(words_S)) for words_S in words_VS]
        self._second = second[0] if second else None
        for target_S, words_S in zip((self._first, *second), words_VS):
            target_S[:] = words_S
        self._shift_T, self._num_around = shift_T, num_around
        is_fine = int(shift_T.sum()) >= FINE_RATE * num_steps * num_weights
        self._fine = True if is_fine else None

    def paths(self, x_NTV: NDArray[np.float32], path_NT: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Write closed paths of small squared error, the states [N, T]; returns which are not
        found, [N]."""
        num_steps, num_groups = len(self._shift_T), len(self._first) >> int(self._shift_T.min())
        most = _LIMIT / self._scale
        fits_N = np.abs(x_NTV).max(axis=(1, 2), initial=0) <= most
        words_NTV = np.rint(np.clip(x_NTV, -most, most) * self._scale).astype(np.int16)
        best_TG = _aligned((num_steps + 1) * num_groups)
        _tail_biting(
            *(words_NTV, self._first, self._second, self._shift_T, self._num_around, self._fine),
            *(path_NT, best_TG.reshape(num_steps + 1, num_groups)),
        )
        return ~fits_N | (path_NT[:, 0] < 0)


def _size(values_SV: NDArray[np.float32]) -> float:
    """The root mean square to three digits: the same on every processor, and 1 where it should be,
    as of all codes whose values are computed."""
    squares = values_SV.astype(np.float64).ravel() ** 2
    size = math.sqrt(math.fsum(squares) / squares.size)
    return float(f"{max(size, 1e-30):.3g}")


def _aligned(num: int) -> NDArray[np.int16]:
    """Memory that begins with a line of the cache, which no vector then shares with another."""
    space = np.empty(num + LANES, np.int16)
    start = -space.ctypes.data // space.itemsize % LANES
    return space[start : start + num]
