"""The Viterbi search on the CPU, compiled by numba. Threads share the tiles; no lock is held.

A step has two halves. First the least cost of the 2^k predecessors f·G + g of every group g of
states (G = 2^(L - k)), four values of f at a time and all g at once. Then the cost of the 2^k
states g·2^k + b of the group: the group's cost is repeated by doubling, the last time fused with
the errors. On one core of an AMD EPYC with AVX-512 the halves run at 32 and 9 · 10⁹ states a second
(L = 12, k = 2); with offsets in place of slices at 9 and 7, one predecessor after another at 19.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import numba
import numpy as np
from numpy.typing import NDArray

from vqllm.codecs.search import viterbi_int16

# No reassociation: costs are the same with any vector width. `contract` is fused multiply-add.
_JIT = {"nogil": True, "cache": True, "fastmath": {"contract", "nnan", "ninf", "nsz"}}

_BIG = np.float32(1e30)
"""Cost of a state that the path may not begin with."""


@numba.njit(**_JIT)
def _least_of_2(c0, c1, best_G, from_G):
    for g in range(len(best_G)):
        less = c1[g] < c0[g]
        best_G[g] = c1[g] if less else c0[g]
        from_G[g] = np.uint8(1) if less else np.uint8(0)


@numba.njit(**_JIT)
def _least_of_4(c0, c1, c2, c3, first, best_G, from_G):
    """The least of four predecessors from number `first` on, and of what is there if first > 0."""
    # Pairs, then the better of both, without branches, so that the loop runs in vector registers.
    u0, u1, u2, u3 = np.uint8(first), np.uint8(first + 1), np.uint8(first + 2), np.uint8(first + 3)
    if first == 0:
        for g in range(len(best_G)):
            less01, less23 = c1[g] < c0[g], c3[g] < c2[g]
            a = c1[g] if less01 else c0[g]
            b = c3[g] if less23 else c2[g]
            from_a = u1 if less01 else u0
            from_b = u3 if less23 else u2
            less = b < a
            best_G[g] = b if less else a
            from_G[g] = from_b if less else from_a
    else:
        for g in range(len(best_G)):
            less01, less23 = c1[g] < c0[g], c3[g] < c2[g]
            a = c1[g] if less01 else c0[g]
            b = c3[g] if less23 else c2[g]
            from_a = u1 if less01 else u0
            from_b = u3 if less23 else u2
            less = b < a
            a = b if less else a
            from_a = from_b if less else from_a
            less = a < best_G[g]
            best_G[g] = a if less else best_G[g]
            from_G[g] = from_a if less else from_G[g]


@numba.njit(**_JIT)
def _least(cost_S, best_G, from_G, num_before):
    """The least cost among the predecessors of each group, and which one it is."""
    # Slices, not offsets: the compiler then knows that no index is negative, and vectorises.
    n = len(best_G)
    if num_before == 2:
        _least_of_2(cost_S[:n], cost_S[n:], best_G, from_G)
        return
    for f in range(0, num_before, 4):
        c = cost_S[f * n :]
        _least_of_4(c[:n], c[n : 2 * n], c[2 * n : 3 * n], c[3 * n : 4 * n], f, best_G, from_G)


@numba.njit(**_JIT)
def _double(source, target):
    """Each value twice."""
    for i in range(len(source)):
        target[2 * i] = source[i]
        target[2 * i + 1] = source[i]


@numba.njit(**_JIT)
def _extend1(best, x, values_S, cost_S):
    """Costs of all states: each of `best` twice, plus the squared error of one weight."""
    for g in range(len(best)):
        a, b = values_S[2 * g] - x, values_S[2 * g + 1] - x
        cost_S[2 * g] = best[g] + a * a
        cost_S[2 * g + 1] = best[g] + b * b


@numba.njit(**_JIT)
def _extend2(best, x, y, first_S, second_S, cost_S):
    """The same for two weights a step."""
    for g in range(len(best)):
        a, b = first_S[2 * g] - x, first_S[2 * g + 1] - x
        c, d = second_S[2 * g] - y, second_S[2 * g + 1] - y
        cost_S[2 * g] = best[g] + (a * a + c * c)
        cost_S[2 * g + 1] = best[g] + (b * b + d * d)


@numba.njit(**_JIT)
def _search(x_TV, values_VS, shift_T, context, closed, path_T, cost_S, best, spare, from_TG):
    """The path of least squared error, its states in `path_T`.

    `context` >= 0 fixes the bits before the first step; `closed` makes the path end with them.
    """
    # A path may begin in the states whose upper L − k bits are the context, or in any.
    num_steps, num_weights = x_TV.shape
    num_states = len(cost_S)
    cost_S[:] = 0
    if context >= 0:
        cost_S[:] = _BIG
        first = context << shift_T[0]
        cost_S[first : first + (1 << shift_T[0])] = 0
    for t in range(num_steps):
        if t == 0:
            for s in range(num_states):
                gap = values_VS[0, s] - x_TV[0, 0]
                error = gap * gap
                if num_weights == 2:
                    gap = values_VS[1, s] - x_TV[0, 1]
                    error += gap * gap
                cost_S[s] += error
            continue
        # The cheapest predecessor of each group; its cost is doubled to all states of the group.
        num = num_states >> shift_T[t]
        _least(cost_S, best[:num], from_TG[t, :num], 1 << shift_T[t])
        source, target = best, spare
        while num < num_states // 2:
            _double(source[:num], target[: 2 * num])
            source, target, num = target, source, 2 * num
        if num_weights == 1:
            _extend1(source[:num], x_TV[t, 0], values_VS[0], cost_S)
        else:
            _extend2(source[:num], x_TV[t, 0], x_TV[t, 1], values_VS[0], values_VS[1], cost_S)
    if closed:
        # The last L - k bits of the ring are the context of its first step.
        num_contexts = num_states >> shift_T[0]
        state, least = context, cost_S[context]
        for s in range(context, num_states, num_contexts):
            if cost_S[s] < least:
                state, least = s, cost_S[s]
    else:
        state = np.argmin(cost_S)
    # Back from the last state by the predecessors that were noted.
    for t in range(num_steps - 1, 0, -1):
        path_T[t] = state
        group = state >> shift_T[t]
        num_groups = num_states >> shift_T[t]
        state = np.int64(from_TG[t, group]) * num_groups + group
    path_T[0] = state


@numba.njit(**_JIT)
def _tail_biting(x_NTV, values_VS, shift_T, num_around, path_NT):
    """Two searches for each tile: around the closing place, then of the whole ring."""
    num_tiles, num_steps, num_weights = x_NTV.shape
    num_states = values_VS.shape[1]
    cost_S = np.empty(num_states, np.float32)
    best = np.empty(num_states, np.float32)
    spare = np.empty(num_states, np.float32)
    from_TG = np.empty((num_steps, num_states >> shift_T.min()), np.uint8)
    # The steps around the place where the ring closes.
    order = np.empty(2 * num_around, np.int64)
    for i in range(2 * num_around):
        order[i] = (num_steps - num_around + i) % num_steps
    around_TV = np.empty((2 * num_around, num_weights), np.float32)
    around_shift_T = shift_T[order]
    around_path_T = np.empty(2 * num_around, np.int32)
    for n in range(num_tiles):
        for i in range(2 * num_around):
            around_TV[i] = x_NTV[n, order[i]]
        _search(
            around_TV,
            values_VS,
            around_shift_T,
            -1,
            False,
            around_path_T,
            cost_S,
            best,
            spare,
            from_TG,
        )
        context = np.int64(around_path_T[num_around]) >> shift_T[0]
        _search(
            x_NTV[n], values_VS, shift_T, context, True, path_NT[n], cost_S, best, spare, from_TG
        )


class Search:
    """The search for a trellis: `values_SV` are the values of the states, float32 [2^L, V],
    `shifts` the new bits of every step, `num_around` the steps on each side of the place where the
    ring closes that are searched first.

    With costs of 16 bits where the trellis and the weights fit them, else in float32.
    """

    def __init__(self, values_SV: NDArray[np.float32], shifts: Sequence[int], num_around: int):
        self._values_VS = np.ascontiguousarray(values_SV.T)
        self._shift_T = np.array(shifts)
        self._num_around = num_around
        self._short = None
        if viterbi_int16.fits(values_SV, self._shift_T):
            self._short = viterbi_int16.Int16Search(values_SV, self._shift_T, num_around)

    def paths(self, x_NTV: NDArray[np.float32], num_threads: int) -> NDArray[np.int32]:
        """Closed paths of small squared error, the states [N, T]; see `viterbi.tail_biting`."""
        num_tiles = len(x_NTV)
        path_NT = np.empty(x_NTV.shape[:2], np.int32)
        bounds = [num_tiles * i // num_threads for i in range(num_threads + 1)]
        parts = [slice(a, b) for a, b in pairwise(bounds) if b > a]

        def search(part: slice) -> None:
            self._search(x_NTV[part], path_NT[part])

        if len(parts) > 1:
            others = [_pool(os.getpid(), num_threads).submit(search, part) for part in parts[1:]]
            search(parts[0])
            for other in others:
                other.result()
        elif parts:
            search(parts[0])
        return path_NT

    def _search(self, x_NTV: NDArray[np.float32], path_NT: NDArray[np.int32]) -> None:
        left_N = np.ones(len(x_NTV), bool)
        if self._short is not None:
            left_N = self._short.paths(x_NTV, path_NT)
        if left_N.any():
            found = np.empty((int(left_N.sum()), x_NTV.shape[1]), np.int32)
            _tail_biting(x_NTV[left_N], self._values_VS, self._shift_T, self._num_around, found)
            path_NT[left_N] = found


@cache
def _pool(process: int, num_threads: int) -> ThreadPoolExecutor:
    """Threads beside the caller's. A process that was forked has none of those of its parent."""
    return ThreadPoolExecutor(num_threads - 1, thread_name_prefix=f"viterbi-{process}")
