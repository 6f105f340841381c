"""The nearest points of shells of the Leech lattice, exactly, compiled by numba.

A code is a set of levels: level l has the points g_l · X, X in shell s_l (|X|² = 16 s_l, in the
integers of `vqllm_kernels.leech.reference`). With Y = τ x/|x|, a point on the ray through x,

    |x − g X|² < e    ⟺    |X − Y|² < 16 s + τ² − (|x|² + 16 s g² − e) τ / (|x| g)

so all lattice points close to Y are listed, and the best e so far bounds how close they must be. τ
is chosen for one level, that with the least expected error: where its points are expected to be
nearest to the ray. The list may prove that other levels have no better point. They are called
served; each of the others gets a Y of its own. On average 8 lattice points lie within
|X − Y|² = 16, the square of the covering radius.

The list: for m = 0 (even points) and m = 1 (odd points) and every Golay word, coordinate i is in
m + 2·(bit i of the word) + 4Z, and nearest there for X_i − Y_i in −2..2. The cost of a word, the
sum of these squares, is a sum over its three bytes. Each byte is one of 16 words of a Hamming code
shifted by one of 16 common words, and two of the bytes determine the third, so partial sums that
are too large end the search of most words: 7 of 2 · 4096 remain. Where ΣX_i is not 4m mod 8, and to
list further points, coordinates move to the next best places of their class, ±4 from the nearest.

At 2 bits this takes 6 to 9 µs a vector, 3 million weights a second, on one core of an AMD EPYC that
is busy with other work.

In a norm (x − v) weight (x − v)ᵀ the list has the points that are nearest to Y in the Euclidean
norm: first the same as without weights, then a second one up to a fixed bound, or as far as the
least eigenvalue of the weight allows a better point. No code of this quality can go below the
geometric mean of the eigenvalues (over their mean). For two blocks of LDLQ on the demo model,
eigenvalues relative to the mean of 0.15 .. 17 and, as in most blocks, 0.7 .. 1.5, the error
relative to that of the nearest points, and µs a vector on a busy core:

    bound       14           16           18           20           geometric mean
    spiky       0.696   16   0.367   25   0.327   48   0.319  105   0.306
    mild        0.994   15   0.980   25   0.978   46   0.978   86   0.978

Source: Conway and Sloane, IEEE Trans. Inform. Theory 32 (1986), 41-50 (decoding the Leech lattice
by the Golay code); Viterbo and Boutros, IEEE Trans. Inform. Theory 45 (1999), 1639-1642 (listing
the points of a lattice in a sphere).

Shape suffixes: N vectors, E = 24 elements, L levels, S shells, M = 2 values of m, C = 16 words of
the code H', A = 16 words of the code H, B = 3 bytes, K = 256 patterns of a byte, F moves.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from vqllm_kernels.leech import reference

_jit = numba.njit(nogil=True, cache=True)

_FIRST_BOUND = 15.0
"""Of |X − Y|², for the first list. 14 takes 2 to 10 % longer, and so does 16."""
_MILD_BOUND, _SPIKY_BOUND = 16.0, 18.0
"""For the list in a norm; the table above says why."""
_MILD = 0.6
"""Least eigenvalue over their mean that makes a norm mild."""
_LARGEST_BOUND = 31.0
"""Below 32 single moves by ±4 reach all points. Gaussian weights need less than 22."""
_DISTANCE = 13.5
"""|X − Y|² of the points of a single shell that are nearest to the ray, on average."""
_SLACK = 1e-4
"""Above the rounding of costs in float32."""
_FAR = 1e30


class _Code(NamedTuple):
    """The levels, ordered by shell; those of shell s are first_S[s] .. first_S[s + 1] − 1."""

    gain_L: NDArray[np.float64]
    size_L: NDArray[np.float64]
    """|X|"""
    cosine_L: NDArray[np.float64]
    """Of the angle between a vector and the nearest point of the shell, about."""
    first_S: NDArray[np.int64]
    words_CA: NDArray[np.int64]


class _Norm(NamedTuple):
    """The norm of errors; `floor` is its least eigenvalue, `bound` that of the list."""

    weight_EE: NDArray[np.float64]
    floor: float
    bound: float
    is_weighted: bool


class _Work(NamedTuple):
    """Memory for one vector at a time."""

    x_E: NDArray[np.float64]
    weighted_x_E: NDArray[np.float64]
    Y_E: NDArray[np.float64]
    X_E: NDArray[np.float64]
    offset_L: NDArray[np.float64]
    slope_L: NDArray[np.float64]
    served_L: NDArray[np.bool_]
    near_ME: NDArray[np.float64]
    gap_ME: NDArray[np.float64]
    base_M: NDArray[np.float64]
    sums_BK: NDArray[np.float32]
    cost_MCBA: NDArray[np.float32]
    least_MCB: NDArray[np.float32]
    bound_MC: NDArray[np.float32]
    extra_F: NDArray[np.float64]
    place_F: NDArray[np.int64]
    step_F: NDArray[np.int64]
    path_F: NDArray[np.int64]


def _memory(num_levels: int) -> _Work:
    """Memory that a thread uses again for all its vectors."""
    return _Work(
        x_E=np.empty(24),
        weighted_x_E=np.empty(24),
        Y_E=np.empty(24),
        X_E=np.empty(24),
        offset_L=np.empty(num_levels),
        slope_L=np.empty(num_levels),
        served_L=np.empty(num_levels, np.bool_),
        near_ME=np.empty((2, 24)),
        gap_ME=np.empty((2, 24)),
        base_M=np.empty(2),
        sums_BK=np.empty((3, 256), np.float32),
        cost_MCBA=np.empty((2, 16, 3, 16), np.float32),
        least_MCB=np.empty((2, 16, 3), np.float32),
        bound_MC=np.empty((2, 16), np.float32),
        extra_F=np.empty(48),
        place_F=np.empty(48, np.int64),
        step_F=np.empty(48, np.int64),
        path_F=np.empty(48, np.int64),
    )


@_jit
def _byte_costs(words_CA, m, w):
    """Costs of the bytes of all words of one m: the nearest coordinates and their gaps, the cost of
    the word without ones, the costs of bytes relative to it, the least of them, least sums."""
    near_E, gap_E, sums_BK = w.near_ME[m], w.gap_ME[m], w.sums_BK
    base = 0.0
    for byte in range(3):
        sums_BK[byte, 0] = 0
        for i in range(8):
            e = 8 * byte + i
            # The nearest coordinate in m + 4Z. A one in the word moves it by 2, to the other side
            # of Y: (2 − |gap|)² in place of gap², that is 4 − 4 |gap| more.
            target = w.Y_E[e] - m
            near_E[e] = 4 * np.rint(target / 4)
            gap_E[e] = target - near_E[e]
            near_E[e] += m
            base += gap_E[e] * gap_E[e]
            # Patterns with bit i set are those below 2^i plus this cost.
            more = np.float32(4 - 4 * abs(gap_E[e]))
            half = 1 << i
            for k in range(half):
                sums_BK[byte, half + k] = sums_BK[byte, k] + more
    # The costs of the three bytes of all words with each common part c, and the least sum.
    w.base_M[m] = base
    for c in range(16):
        bound = np.float32(base)
        for byte in range(3):
            least = np.float32(_FAR)
            for a in range(16):
                cost = sums_BK[byte, words_CA[c, a]]
                w.cost_MCBA[m, c, byte, a] = cost
                least = min(least, cost)
            w.least_MCB[m, c, byte] = least
            bound += least
        w.bound_MC[m, c] = bound


@_jit
def _needed(error, w):
    """The bound of |X − Y|² below which all points with less than this error are."""
    bound = -_FAR
    for level in range(len(w.offset_L)):
        bound = max(bound, w.offset_L[level] + w.slope_L[level] * error)
    return bound


@_jit
def _moves(gap_E, word, room, w):
    """Moves of one coordinate by ±4 that cost at most `room`, the cheapest first; their number."""
    num = 0
    for e in range(24):
        # The gap with this word. To the next place and to the one on the other side the square
        # grows by (4 ∓ |gap|)² − gap² = 16 ∓ 8 |gap|.
        gap = gap_E[e]
        if word >> e & 1:
            gap -= 2 if gap >= 0 else -2
        step = 4 if gap >= 0 else -4
        for extra in (16 - 8 * abs(gap), 16 + 8 * abs(gap)):
            # Inserted in the order of the costs.
            if extra <= room:
                f = num
                while f > 0 and w.extra_F[f - 1] > extra:
                    w.extra_F[f] = w.extra_F[f - 1]
                    w.place_F[f] = w.place_F[f - 1]
                    w.step_F[f] = w.step_F[f - 1]
                    f -= 1
                w.extra_F[f], w.place_F[f], w.step_F[f] = extra, e, step
                num += 1
            step = -step
    return num


@_jit
def _compare(best_level, best_error, best_X_E, x_square, code, norm, w):
    """The better one of the best code so far and the point X_E, if it is in a shell of the code.

    Args:
        x_square: x weight xᵀ.
    """
    # |X|² = 16 s gives the shell, which must have a level.
    shell_square = 0.0
    for e in range(24):
        shell_square += w.X_E[e] * w.X_E[e]
    shell = int(shell_square) >> 4
    if shell >= len(code.first_S) - 1 or code.first_S[shell] == code.first_S[shell + 1]:
        return best_level, best_error
    # (x − g X) weight (x − g X)ᵀ = x weight xᵀ − 2 g X·(x weight) + g² X weight Xᵀ for all gains.
    product, square = 0.0, shell_square
    for e in range(24):
        product += w.X_E[e] * w.weighted_x_E[e]
    if norm.is_weighted:
        square = 0.0
        for e in range(24):
            row = 0.0
            for f in range(24):
                row += norm.weight_EE[e, f] * w.X_E[f]
            square += row * w.X_E[e]
    for level in range(code.first_S[shell], code.first_S[shell + 1]):
        gain = code.gain_L[level]
        error = x_square - 2 * gain * product + gain * gain * square
        if error < best_error:
            best_level, best_error = level, error
            for e in range(24):
                best_X_E[e] = int(w.X_E[e])
    return best_level, best_error


@_jit
def _list_word(m, word, bound, best_level, best_error, best_X_E, x_square, code, norm, w):
    """Compare all points of a word within the bound; returns the best level, error and bound."""
    # The nearest X with this word, and Σ X_i, which must be 4m mod 8: each move changes it by 4.
    cost, total = 0.0, 0
    for e in range(24):
        gap = w.gap_ME[m, e]
        away = 0
        if word >> e & 1:
            away = 2 if gap >= 0 else -2
        w.X_E[e] = w.near_ME[m, e] + away
        cost += (gap - away) ** 2
        total += int(w.X_E[e])
    num = _moves(w.gap_ME[m], word, bound - cost, w)
    # All sets of moves, depth first; `depth` of them have been made, those of `path_F`.
    depth, f, is_new = 0, 0, True
    while True:
        if is_new and (total - 4 * m) & 7 == 0:
            last_error = best_error
            best_level, best_error = _compare(
                best_level, best_error, best_X_E, x_square, code, norm, w
            )
            if best_error < last_error:
                bound = min(bound, _needed(best_error / norm.floor, w))
        if f < num and cost + w.extra_F[f] <= bound:
            w.X_E[w.place_F[f]] += w.step_F[f]
            cost, total = cost + w.extra_F[f], total + 4
            w.path_F[depth] = f
            depth, f, is_new = depth + 1, f + 1, True
        elif depth > 0:
            depth -= 1
            f = w.path_F[depth]
            w.X_E[w.place_F[f]] -= w.step_F[f]
            cost, total = cost - w.extra_F[f], total - 4
            f, is_new = f + 1, False
        else:
            return best_level, best_error, bound


@_jit
def _list(bound, best_level, best_error, best_X_E, x_square, code, norm, w):
    """Compare all points within the bound of Y; returns the best level and error."""
    words_CA = code.words_CA
    bound = min(bound, _needed(best_error / norm.floor, w))
    visited = 0
    for _ in range(32):
        choice, least = -1, np.float32(_FAR)
        for mc in range(32):
            if not visited >> mc & 1 and w.bound_MC[mc >> 4, mc & 15] < least:
                choice, least = mc, w.bound_MC[mc >> 4, mc & 15]
        if least > bound + _SLACK:
            break
        visited |= 1 << choice
        m, c = choice >> 4, choice & 15
        cost_BA, least_B = w.cost_MCBA[m, c], w.least_MCB[m, c]
        for a in range(16):
            cost_a = np.float32(w.base_M[m]) + cost_BA[0, a]
            if cost_a + least_B[1] + least_B[2] > bound + _SLACK:
                continue
            for b in range(16):
                cost_ab = cost_a + cost_BA[1, b]
                if cost_ab + least_B[2] > bound + _SLACK:
                    continue
                if cost_ab + cost_BA[2, a ^ b] <= bound + _SLACK:
                    # H is linear in its numbers: H(a) ^ H(b) = H(a ^ b).
                    word = words_CA[c, a] | words_CA[c, b] << 8 | words_CA[c, a ^ b] << 16
                    best_level, best_error, bound = _list_word(
                        m, word, bound, best_level, best_error, best_X_E, x_square, code, norm, w
                    )
    return best_level, best_error


@_jit
def _aim(tau, norm_x, code, w):
    """Set Y to the point of the ray at τ, and bounds and costs to this Y."""
    for e in range(24):
        w.Y_E[e] = w.x_E[e] * (tau / norm_x)
    for level in range(len(code.gain_L)):
        w.offset_L[level], w.slope_L[level] = -_FAR, 0.0
        if not w.served_L[level]:
            gain, size = code.gain_L[level], code.size_L[level]
            w.slope_L[level] = tau / (norm_x * gain)
            sphere = norm_x * norm_x + (size * gain) ** 2
            w.offset_L[level] = size * size + tau * tau - w.slope_L[level] * sphere
    for m in range(2):
        _byte_costs(code.words_CA, m, w)


@_jit
def _promising(best_error, norm_x, code, w):
    """The level that is expected to have the nearest point, and its τ on the ray; −1 if no level
    that is not served can have a better point. Levels that cannot are marked as served."""
    pick, least, tau = -1, np.inf, 0.0
    for level in range(len(code.gain_L)):
        # The sphere of a level is at least | |x| − radius | away from x.
        size, cosine = code.size_L[level], code.cosine_L[level]
        radius = code.gain_L[level] * size
        if radius == 0 or (norm_x - radius) ** 2 >= best_error:
            w.served_L[level] = True
        if not w.served_L[level]:
            # The error expected at the usual angle. If it is above the best one so far, only points
            # at a smaller angle are of interest, and τ is that of such a point.
            error = norm_x * norm_x - 2 * norm_x * radius * cosine + radius * radius
            if error < least:
                pick, least = level, error
                if best_error < error:
                    cosine = (norm_x * norm_x + radius * radius - best_error) / (
                        2 * norm_x * radius
                    )
                tau = size * min(cosine, 1.0)
    return pick, tau


@_jit
def _nearest(x_E, best_X_E, code, plain, norm, w):
    """The level of the nearest point, −1 for the origin; the point goes to `best_X_E`."""
    square = 0.0
    for e in range(24):
        best_X_E[e] = 0
        w.x_E[e] = w.weighted_x_E[e] = x_E[e]
        square += w.x_E[e] * w.x_E[e]
    norm_x = np.sqrt(square)
    w.served_L[:] = False
    # A literal would be a type of its own: all functions would be compiled twice.
    best_level, best_error = np.int64(-1), square
    # One point Y on the ray for the most promising level, until all levels are served.
    while True:
        pick, tau = _promising(best_error, norm_x, code, w)
        if pick < 0:
            break
        _aim(tau, norm_x, code, w)
        bound = min(w.offset_L[pick] + w.slope_L[pick] * best_error, _FIRST_BOUND)
        while True:
            best_level, best_error = _list(
                bound, best_level, best_error, best_X_E, square, code, plain, w
            )
            wanted = w.offset_L[pick] + w.slope_L[pick] * best_error
            if wanted <= bound or bound >= _LARGEST_BOUND:
                break
            # In small steps: the length of the list grows with the twelfth power of the bound.
            bound = min(wanted, 1.1 * bound, _LARGEST_BOUND)
        # A level whose own bound is within that of the list has no better point left.
        for level in range(len(code.gain_L)):
            if w.offset_L[level] + w.slope_L[level] * best_error <= bound:
                w.served_L[level] = True
        w.served_L[pick] = True
    if norm.is_weighted and square > 0:
        best_level = _nearest_in_norm(best_level, norm_x, best_X_E, code, norm, w)
    return best_level


@_jit
def _nearest_in_norm(best_level, norm_x, best_X_E, code, norm, w):
    """The level of the best point in a norm, beginning with the nearest in the Euclidean norm."""
    # x weight, x weight xᵀ, and the error of the point that is nearest without weights.
    gain = code.gain_L[best_level] if best_level >= 0 else 0.0
    square, best_error = 0.0, 0.0
    for e in range(24):
        row, gap_row = 0.0, 0.0
        for f in range(24):
            row += norm.weight_EE[e, f] * w.x_E[f]
            gap_row += norm.weight_EE[e, f] * (w.x_E[f] - gain * best_X_E[f])
        w.weighted_x_E[e] = row
        square += row * w.x_E[e]
        best_error += gap_row * (w.x_E[e] - gain * best_X_E[e])
    # With less weighted error, the Euclidean error is at most that over the least eigenvalue.
    w.served_L[:] = False
    pick, tau = _promising(best_error / norm.floor, norm_x, code, w)
    if pick >= 0:
        _aim(tau, norm_x, code, w)
        best_level, _ = _list(norm.bound, best_level, best_error, best_X_E, square, code, norm, w)
    return best_level


@_jit
def _nearest_all(x_NE, X_NE, level_N, code, plain, norm, w):
    for n in range(len(x_NE)):
        level_N[n] = _nearest(x_NE[n], X_NE[n], code, plain, norm, w)


def nearest(
    x_NE: NDArray[np.float32],
    gains: NDArray[np.float64],
    shells: tuple[int, ...],
    num_threads: int,
    weight_EE: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
    """Nearest points: X [N, 24] and the place of its shell in `shells`, 0 for the origin, [N].

    Args:
        x_NE: finite vectors.
        gains: of the levels, not negative.
        shells: of the levels.
        weight_EE: positive definite; the nearest are those of least (x − v) weight (x − v)ᵀ.
    """
    # Levels in the order of their shells, so that those of a shell are a range.
    order = np.argsort(shells, kind="stable")
    shell_L = np.array(shells)[order]
    words_CA = np.bitwise_xor.outer(*map(np.array, reversed(reference.hamming_words())))
    first_S = np.searchsorted(shell_L, np.arange(max(shells) + 2))
    size_L = 4 * np.sqrt(shell_L)
    cosine_L = np.sqrt(1 - _DISTANCE / size_L**2)
    code = _Code(gains[order], size_L, cosine_L, first_S, words_CA)
    plain = norm = _Norm(np.eye(24), 1.0, _FIRST_BOUND, False)
    if weight_EE is not None:
        eigenvalues = np.linalg.eigvalsh(weight_EE)
        is_mild = eigenvalues[0] > _MILD * eigenvalues.mean()
        floor = max(eigenvalues[0], 1e-6 * eigenvalues[-1])
        norm = _Norm(weight_EE, floor, _MILD_BOUND if is_mild else _SPIKY_BOUND, True)

    X_NE, level_N = np.empty(x_NE.shape, np.int8), np.empty(len(x_NE), np.int64)
    bounds = np.linspace(0, len(x_NE), num_threads + 1).astype(int)
    parts = [slice(a, b) for a, b in pairwise(bounds) if b > a]

    def search(part: slice) -> None:
        work = _memory(len(shells))
        _nearest_all(x_NE[part], X_NE[part], level_N[part], code, plain, norm, work)

    if len(parts) == 1:
        search(parts[0])
    else:
        with ThreadPoolExecutor(max(len(parts), 1)) as pool:
            list(pool.map(search, parts))
    return X_NE, np.where(level_N < 0, 0, order[level_N])
