"""The nearest points of the E8P codebook, exactly, without comparing all 65536 of them.

The codebook is two copies of D8 + 1/2, shifted by +1/4 and −1/4 and cut to a ball. Its absolute
values before the shift are eight shapes up to permutation, each with at least three 1/2. For one
shift let y = x − shift. Among all permutations and signs of one shape, the point nearest to y puts
the largest value where |y| is largest and takes the signs of y; where the parity of these signs is
not the one that the lattice demands of the shape, the cheapest repair is to flip the sign at the
smallest |y|, because a 1/2 stands there. So eight shapes and two shifts give 16 candidates in
closed form, and the best of them is nearest. The exception is the last shape, of squared norm 12:
the codebook has 29 of its 56 permutations. Where a permutation that is missing would be the nearest
(4 % of Gaussian vectors), the 29 vectors are compared one by one.

Source: rounding and repairing the parity to decode D_n, Conway and Sloane, IEEE Trans. Inform.
Theory 28 (1982), 227-232; the codebook of QuIP#, arXiv 2402.04396.

Shape suffixes: N vectors, E = 8 elements, S shapes, A absolute vectors, T = 2 shifts, D = 240 roots
of E8, F = 9, K candidates, C = 65536 codes.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vqllm.codecs.base import smallest
from vqllm_kernels.e8p import reference

_CHUNK = 1 << 12
"""Vectors at a time, so that intermediate results stay in the second-level cache."""
_FIRST_OF_LAST_SHAPE = 256 - reference.NUM_SHELL_12
_NUM_WHOLE_ROOTS = 112
"""Of the 240 roots of E8, those with integer elements; they come first."""
_FAR = 1e30
"""Above all errors."""
_MAX_STEPS = 4
"""Steps of the weighted search. With one large eigenvalue they change 82, 4, 0.4 and 0.07 %."""


@dataclass(frozen=True)
class _Tables:
    """Constants of the codebook on one device. Digits 0, 1, 2 stand for 1/2, 3/2, 5/2.

    A sign is −1 where the sum of a vector is odd, hence also the number of minus signs it needs.
    """

    shapes_SE: Tensor
    norms_S: Tensor
    signs_S: Tensor
    digits_SE: Tensor
    abs_AE: Tensor
    norms_A: Tensor
    signs_A: Tensor
    base_negative_A: Tensor
    index_by_key: Tensor
    sign_by_pattern: Tensor
    powers_of_2: Tensor
    powers_of_4: Tensor
    roots_DE: Tensor
    twice_roots_DE: Tensor


@cache
def _tables(device: torch.device) -> _Tables:
    # Absolute values times two are the odd integers 1, 3, 5. Sorted, they are one of eight shapes.
    twice = reference.abs_table().to(torch.int64)
    shapes = twice.sort(1, descending=True).values.unique(dim=0)
    shapes = shapes[(shapes**2).sum(1).argsort(stable=True)]
    # The digits 0, 1, 2 of an absolute vector make a number to base 4, which finds its row.
    powers_of_4 = 4 ** torch.arange(8)
    index_by_key = torch.full((4**8,), -1)
    index_by_key[((twice - 1) // 2 * powers_of_4).sum(1)] = torch.arange(256)
    parity = (torch.arange(256)[:, None] >> torch.arange(8) & 1).sum(1) % 2
    tensors = (
        shapes / 2,
        (shapes**2).sum(1) / 4,
        1.0 - (shapes.sum(1) // 2) % 2 * 2,
        (shapes - 1.0) / 2,
        twice / 2,
        (twice**2).sum(1) / 4,
        1.0 - (twice.sum(1) // 2) % 2 * 2,
        (reference.base_table()[:, 0] < 0).to(torch.int64),
        index_by_key,
        1.0 - 2.0 * parity,
        (1 << torch.arange(8)).float(),
        powers_of_4.float(),
        reference.e81b_table()[1:241].float() / 2,
        reference.e81b_table()[1:241],
    )
    return _Tables(*(tensor.to(device) for tensor in tensors))


@cache
def _barred(device: torch.device) -> Tensor:
    """For the 240 lattice neighbours of each codeword: 0 if in the codebook, −1e30 if not.

    float32 [65536, 240], 63 MB and 0.6 seconds to build, when it is first needed. It is added to
    errors directly: to convert a table of bytes took half the time of a weighted search.
    """
    codes = torch.arange(1 << 16, device=device)
    roots = torch.arange(240, device=device)
    chunks = [
        _neighbours(chunk, roots.expand(len(chunk), 240)) < 0 for chunk in codes.split(_CHUNK // 4)
    ]
    return torch.cat([chunk.float().mul_(-_FAR) for chunk in chunks])


def nearest(x_NE: Tensor) -> Tensor:
    """Codes of the nearest codewords, int64 [N].

    Args:
        x_NE: finite vectors in units of the scale, float32 [N, 8].
    """
    return torch.cat([_nearest(chunk) for chunk in x_NE.split(_CHUNK)])


def _nearest(x_NE: Tensor) -> Tensor:
    # |y|² + |s|² − 2 |y|·s for the shapes s, both sorted; a repair of the parity flips the sign at
    # the smallest |y|, beside a 1/2, and costs 2 |y|.
    t = _tables(x_NE.device)
    y_NTE, pattern_NT, sign_NT = _shifted(x_NE, t)
    sorted_NTE, order_NTE = y_NTE.abs().sort(-1, descending=True)
    smallest_NT = sorted_NTE[..., 7]
    repair_NTS = smallest_NT[..., None] - (sign_NT * smallest_NT)[..., None] * t.signs_S
    cost_NTS = (y_NTE * y_NTE).sum(-1, keepdim=True) + t.norms_S + repair_NTS
    cost_NTS -= 2 * (sorted_NTE @ t.shapes_SE.T)

    def codes(cost_NTS: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The shape's values in the order of |y| give the row of the table, −1 if it is missing; the
        # signs are those of y but for the repair.
        cost, best = cost_NTS.flatten(1).min(1)
        shift, shape = best >> 3, best & 7
        pick = 2 * row + shift
        order = order_NTE.flatten(0, 1).index_select(0, pick)
        digits = t.digits_SE.index_select(0, shape)
        key = (t.powers_of_4.take(order) * digits).sum(1).to(torch.int64)
        index = t.index_by_key[key]
        flip = (sign_NT.take(pick) != t.signs_S[shape]).to(torch.int64) << order[:, 7]
        return _code(index, pattern_NT.take(pick) ^ flip, shift, t), index, cost

    code, index, _ = codes(cost_NTS, torch.arange(len(x_NE), device=x_NE.device))
    # A missing permutation is of the last shape: the best of other shapes, or of its 29 vectors.
    missing = (index < 0).nonzero()[:, 0]
    if len(missing):
        cost_NTS[missing, :, 7] = torch.inf
        other_code, _, other_cost = codes(cost_NTS[missing], missing)
        last_code, last_cost = search(x_NE[missing], _FIRST_OF_LAST_SHAPE)
        code[missing] = torch.where(last_cost < other_cost, last_code, other_code)
    return code


def search(x_NE: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """Codes of the nearest codewords and squared distances, by trying absolute vectors one by one.

    Exact like `nearest` and ten to twenty times slower.

    Args:
        first: only the rows of `abs_table` from here on.
    """
    t = _tables(x_NE.device)
    abs_AE, norms_A, signs_A = t.abs_AE[first:], t.norms_A[first:], t.signs_A[first:]
    y_NTE, pattern_NT, sign_NT = _shifted(x_NE, t)
    # The least a flipped sign costs is 4 |y_i| a_i; it is needed where the parities differ.
    magnitude_NTE = y_NTE.abs()
    flip_NTA = magnitude_NTE[..., :1] * abs_AE[:, 0]
    for i in range(1, 8):
        flip_NTA = torch.minimum(flip_NTA, magnitude_NTE[..., i : i + 1] * abs_AE[:, i])
    cost_NTA = (y_NTE * y_NTE).sum(-1, keepdim=True) + norms_A
    cost_NTA += 2 * (1 - sign_NT[..., None] * signs_A) * flip_NTA
    cost_NTA -= 2 * (magnitude_NTE @ abs_AE.T)
    cost, best = cost_NTA.flatten(1).min(1)
    # Shift and absolute vector of the best one, and the sign to flip for it.
    shift = (best >= len(abs_AE)).to(torch.int64)
    a = best - shift * len(abs_AE)
    row = torch.arange(len(x_NE), device=x_NE.device)
    place = (magnitude_NTE[row, shift] * abs_AE[a]).argmin(1)
    flip = (sign_NT[row, shift] != signs_A[a]).to(torch.int64) << place
    return _code(a + first, pattern_NT[row, shift] ^ flip, shift, t), cost


def candidates(x_NE: Tensor, num: int) -> Tensor:
    """Codes of `num` codewords near each vector, int64 [N, num], the nearest first.

    After the nearest codeword come its lattice neighbours that belong to the codebook, in the order
    of their distance to x. If there are too few, the nearest codeword is repeated.
    """
    if num == 1:
        return nearest(x_NE)[:, None]
    return torch.cat([_candidates(chunk, num) for chunk in x_NE.split(_CHUNK // 4)])


def _candidates(x_NE: Tensor, num: int) -> Tensor:
    # All roots r have one norm, so neighbours w + r are the nearer, the larger (x − w)·r is.
    code_N = _nearest(x_NE)
    gap_NE = x_NE - reference.codewords(code_N)
    before_ND = _barred(x_NE.device).index_select(0, code_N)
    before_ND.addmm_(gap_NE, _tables(x_NE.device).roots_DE.T)
    root_NK = smallest(before_ND.neg_(), min(num - 1, 240))
    code_NK = _neighbours(code_N, root_NK)
    code_NK = torch.where(code_NK < 0, code_N[:, None], code_NK)
    return torch.cat((code_N[:, None], code_NK), 1)


def weighted_nearest(x_NE: Tensor, weight_EE: Tensor) -> Tensor:
    """Codes of codewords w with nearly the least (x − w) weight (x − w)ᵀ, int64 [N].

    From the nearest codeword (not weighted) to its best lattice neighbour in the codebook, and on
    until none is better. For Gaussian x the mean error is 0.5 % above that of an exact search
    where the eigenvalues of the weight are 0.3 to 3, and 2 % where one of them is 117; that of the
    nearest codeword is 24 % above, and 8 times as large.
    """
    codes = []
    for chunk in x_NE.split(_CHUNK):
        # Short chunks only for the errors of all neighbours; with them `_nearest` takes 2.4 times
        # as long.
        parts = zip(_nearest(chunk).split(_CHUNK // 4), chunk.split(_CHUNK // 4))
        codes += [_descend(code_N, x_NE, weight_EE) for code_N, x_NE in parts]
    return torch.cat(codes)


def _descend(code_N: Tensor, x_NE: Tensor, weight_EE: Tensor) -> Tensor:
    # A step by a root r lowers the error by 2 (x − w) weight rᵀ − r weight rᵀ.
    t, barred_CD = _tables(x_NE.device), _barred(x_NE.device)
    own_D = ((t.roots_DE @ weight_EE) * t.roots_DE).sum(1)
    gain_FD = torch.cat((2 * t.roots_DE.T, -own_D[None]))
    least_gain = 1e-5 * own_D.mean()  # below is rounding
    root_D = torch.arange(240, dtype=torch.int32, device=x_NE.device)
    row = torch.arange(len(x_NE), device=x_NE.device)
    code_N = code_N.clone()
    for _ in range(_MAX_STEPS):
        code = code_N[row]
        gap_NE = (x_NE[row] - reference.codewords(code)) @ weight_EE
        gain_ND = barred_CD.index_select(0, code)
        gain_ND.addmm_(torch.nn.functional.pad(gap_NE, (0, 1), value=1.0), gain_FD)
        # Positive floats are ordered like their bits. With the root in the last eight of them the
        # maximum and its place take 0.12 µs a vector in place of 0.36.
        key_ND = gain_ND.view(torch.int32).bitwise_and_(-256).bitwise_or_(root_D)
        key = key_ND.amax(1)
        better = key.view(torch.float32) > least_gain
        row = row[better]
        if len(row) == 0:
            break
        root = (key[better] & 255).to(torch.int64)
        code_N[row] = _neighbours(code[better], root[:, None])[:, 0]
    return code_N


def _neighbours(code_N: Tensor, root_NK: Tensor) -> Tensor:
    """Codes of the lattice points one root away from codewords, int64 [N, K]; −1 for points that
    are not in the codebook."""
    t = _tables(code_N.device)
    shift_N = (t.sign_by_pattern[code_N & 0xFF] < 0).to(torch.int64)
    is_half_NK = root_NK >= _NUM_WHOLE_ROOTS
    # A root r of halves leads to the other shift: from h/2 + q/4 to (h + 2r + q)/2 − q/4.
    quarter_N1 = 1 - 2 * shift_N[:, None]
    twice_NE = 2 * reference.codewords(code_N) - quarter_N1 / 2
    starts_NTE = torch.stack((twice_NE, twice_NE + quarter_N1), 1).to(torch.int8)
    row_N1 = torch.arange(len(code_N), device=code_N.device)[:, None]
    start = starts_NTE.flatten(0, 1).index_select(0, (2 * row_N1 + is_half_NK).flatten())
    twice = start + t.twice_roots_DE.index_select(0, root_NK.flatten())

    # The digit 3, a value above 5/2, finds no row.
    digits = ((twice.abs() - 1) >> 1).clamp(max=3)
    index_NK = t.index_by_key[(digits.float() @ t.powers_of_4).to(torch.int64)].view_as(root_NK)
    pattern_NK = _pattern(twice < 0, t).view_as(root_NK)
    code_NK = _code(index_NK, pattern_NK, shift_N[:, None] ^ is_half_NK.to(torch.int64), t)
    return torch.where(index_NK < 0, -1, code_NK)


def _pattern(negative: Tensor, t: _Tables) -> Tensor:
    """Eight booleans as the bits of a number, int64 [...]."""
    return (negative.float() @ t.powers_of_2).to(torch.int64)


def _shifted(x_NE: Tensor, t: _Tables) -> tuple[Tensor, Tensor, Tensor]:
    """x − shift for both shifts, its minus signs as bits of a number, their parity as ±1."""
    y_NTE = torch.stack((x_NE - 0.25, x_NE + 0.25), 1)
    pattern_NT = _pattern(y_NTE < 0, t)
    return y_NTE, pattern_NT, t.sign_by_pattern[pattern_NT]


def _code(index: Tensor, pattern: Tensor, shift: Tensor, t: _Tables) -> Tensor:
    """The code of an absolute vector with minus signs where `pattern` has bits."""
    return index << 8 | (pattern ^ t.base_negative_A[index] ^ shift)
