"""The bits of format pyramid-v1: D consecutive weights of a row as a direction and a length.

Direction. y, D integers with Σ|y_i| = K: K pulses on D places. There are N(D, K) of them,

    N(d, k) = N(d − 1, k) + N(d − 1, k − 1) + N(d, k − 1),   N(d, 0) = 1,   N(0, k) = 0 for k > 0,

and y is number  Σ_i 2 S(e_i, j_i) + s_i N(e_i, j_i)  of them, where for coordinate i = 0..D−1
    e_i = D − 1 − i               coordinates that follow,
    j_i = |y_{i+1}| + ... + |y_{D−1}|   pulses on them,
    s_i = 1 if y_i < 0, else 0,
    S(e, j) = N(e, 0) + ... + N(e, j − 1).
So large |y_0| come first, y_0 before −y_0, and vectors with equal y_0 are ordered by what follows.

Code. number · G + g, where g = 0..G−1 is the place in the table `levels`: an integer of
ceil(log2(N(D, K) · G)) bits. Where number would be N(D, K) or more, it means N(D, K) − 1.

    W = y · (levels[g] / sqrt(Σ y_i²)),  float32, in this order of operations

The codes of a row of tiles are packed as in `bitpack`, without gaps. Here they are symbols of 16
bits, the low ones first, and for arithmetic digits of 48 bits, which add and multiply in int64
without overflow.

Source: PVQ, arXiv 2410.16926; the numbering of pulse vectors goes back to Fischer, IEEE Trans.
Inform. Theory 32 (1986), 568-583.
"""

from functools import cache
from math import comb

import torch
from torch import Tensor

from vqllm_kernels.bitpack import unpack_wide

DIGIT_BITS = 48
SYMBOL_BITS = 16
MAX_PULSES = 512
CHUNK = 1 << 18
"""Weights that are decoded at a time, so that what is in between stays in the cache."""


@cache
def num_directions(dim: int, pulses: int) -> int:
    """N(dim, pulses), by the number of coordinates that are not zero."""
    if pulses == 0:
        return 1
    return sum(comb(dim, i) * comb(pulses - 1, i - 1) << i for i in range(1, dim + 1))


def tile_bits(dim: int, pulses: int, levels: int) -> int:
    """Bits of the code of a tile."""
    return (num_directions(dim, pulses) * levels - 1).bit_length()


@cache
def most_pulses(dim: int, levels: int, bits: int) -> int:
    """The largest number of pulses whose codes have at most `bits` bits; 0 if there is none."""
    fitting = 0
    while fitting < MAX_PULSES and tile_bits(dim, fitting + 1, levels) <= bits:
        fitting += 1
    return fitting


@cache
def _offsets(dim: int, pulses: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """2 S(e, j) + s N(e, j) at [e, 2j + s], for e < dim and j <= pulses, s = 0 at j = pulses.

    Returns:
        int64 [dim, L, 2 · pulses + 1], the digits, and float64 [dim, 2 · pulses + 1].
    """
    counts = [1] + [0] * pulses
    rows = []
    for _ in range(dim):
        row = [0]
        for count in counts:
            row += [row[-1] + count, row[-1] + 2 * count]
        rows.append(row[:-2])
        following = [1]
        for k in range(1, pulses + 1):
            following.append(counts[k] + counts[k - 1] + following[k - 1])
        counts = following
    num_digits = -(-num_directions(dim, pulses).bit_length() // DIGIT_BITS)
    digits_E2KL = torch.tensor(
        [[_digits(entry, num_digits) for entry in row] for row in rows], device=device
    )
    return digits_E2KL.transpose(1, 2).contiguous(), _approximate(list(digits_E2KL.unbind(2)))


def _digits(number: int, num_digits: int) -> list[int]:
    return [number >> DIGIT_BITS * i & (1 << DIGIT_BITS) - 1 for i in range(num_digits)]


def _approximate(digits: list[Tensor]) -> Tensor:
    """Numbers in float64: the same or larger for larger numbers, as each rounding keeps order."""
    total = digits[0].double()
    for i, digit in enumerate(digits[1:], start=1):
        total = total + digit.double() * 2.0 ** (DIGIT_BITS * i)
    return total


def _carry(digits: list[Tensor], num_digits: int) -> list[Tensor]:
    """The digits of Σ digits[i] · 2^(48 i), where digits[i] may be as large as int64 holds."""
    proper, carry = [], torch.zeros_like(digits[0])
    for i in range(num_digits):
        total = digits[i] + carry if i < len(digits) else carry
        proper.append(total & (1 << DIGIT_BITS) - 1)
        carry = total >> DIGIT_BITS
    return proper


def _minus(a: list[Tensor], b: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The digits of a − b, modulo the power of 2^48 above them, and where b > a."""
    difference, borrow = [], torch.zeros_like(a[0])
    for x, y in zip(a, b):
        total = x - y + borrow
        difference.append(total & (1 << DIGIT_BITS) - 1)
        borrow = total >> DIGIT_BITS
    return difference, borrow < 0


def number_of(y_DN: Tensor, pulses: int) -> list[Tensor]:
    """The numbers of integer vectors with `pulses` pulses, digits int64 [N]."""
    dim = len(y_DN)
    digits_EL2K, _ = _offsets(dim, pulses, y_DN.device)
    following_N = torch.full_like(y_DN[0], pulses, dtype=torch.int64)
    totals = torch.zeros(digits_EL2K.shape[1], y_DN.shape[1], dtype=torch.int64, device=y_DN.device)
    for i in range(dim):
        y_N = y_DN[i].to(torch.int64)
        following_N = following_N - y_N.abs()
        totals += digits_EL2K[dim - 1 - i][:, 2 * following_N + (y_N < 0)]
    return _carry(list(totals), len(totals))


def vector_of(number: list[Tensor], dim: int, pulses: int) -> Tensor:
    """Inverse of `number_of`: int64 [D, N]. Numbers that are too large mean the last vector."""
    device = number[0].device
    digits_EL2K, approximate_E2K = _offsets(dim, pulses, device)
    last = [
        torch.full_like(number[0], digit)
        for digit in _digits(num_directions(dim, pulses) - 1, len(number))
    ]
    _, too_large_N = _minus(last, number)
    rest = [torch.where(too_large_N, a, b) for a, b in zip(last, number)]
    rest = rest[: digits_EL2K.shape[1]]
    pulses_left_N = torch.full_like(number[0], pulses)
    coordinates = []
    for e in reversed(range(dim)):
        # The last entry that is at most the rest. In float64, where numbers of more than 53 bits
        # are rounded, it may be found one place too far, as the subtraction tells; never more:
        # entries that are so large are further apart than the rounding.
        place_N = torch.searchsorted(approximate_E2K[e], _approximate(rest), right=True) - 1
        following, beyond_N = _minus(rest, list(digits_EL2K[e][:, place_N]))
        if len(rest) > 1:
            place_N = place_N - beyond_N.to(torch.int64)
            following, _ = _minus(rest, list(digits_EL2K[e][:, place_N]))
        rest = following
        following_N, negative_N = place_N >> 1, place_N & 1
        size_N = pulses_left_N - following_N
        coordinates.append(torch.where(negative_N > 0, -size_N, size_N))
        pulses_left_N = following_N
    return torch.stack(coordinates)


def join(number: list[Tensor], level_N: Tensor, levels: int, bits: int) -> Tensor:
    """Codes number · levels + level as symbols, int32 [N, ceil(bits/16)]."""
    num_digits = -(-bits // DIGIT_BITS)
    scaled = [digit * levels for digit in number]
    scaled[0] = scaled[0] + level_N
    per_digit = DIGIT_BITS // SYMBOL_BITS
    symbols = [
        digit >> SYMBOL_BITS * i & (1 << SYMBOL_BITS) - 1
        for digit in _carry(scaled, num_digits)
        for i in range(per_digit)
    ]
    return torch.stack(symbols[: -(-bits // SYMBOL_BITS)], 1).to(torch.int32)


def split(codes_NM: Tensor, levels: int) -> tuple[list[Tensor], Tensor]:
    """Inverse of `join`: the digits of the numbers, and the levels int64 [N]."""
    per_digit = DIGIT_BITS // SYMBOL_BITS
    digits = []
    for symbols_NM in codes_NM.to(torch.int64).split(per_digit, 1):
        digits.append(sum(s_N << SYMBOL_BITS * i for i, s_N in enumerate(symbols_NM.unbind(1))))
    remainder_N = torch.zeros_like(digits[0])
    number = []
    for digit in reversed(digits):
        total = (remainder_N << DIGIT_BITS) + digit
        number.insert(0, total // levels)
        remainder_N = total - number[0] * levels
    return number, remainder_N


def decode_tiles(codes_NM: Tensor, levels_G: Tensor, dim: int, pulses: int) -> Tensor:
    """Weights, float32 [N, D], of codes int32 [N, M]; differentiable in the levels."""
    tiles = []
    for chunk_NM in codes_NM.split(max(CHUNK // dim, 1)):
        number, level_N = split(chunk_NM, len(levels_G))
        y_DN = vector_of(number, dim, pulses)
        norm_N = (y_DN * y_DN).sum(0).float().sqrt()
        tiles.append((y_DN * (levels_G[level_N] / norm_N)).T)
    return torch.cat(tiles) if tiles else levels_G.new_zeros(0, dim)


def decode(tensors: dict[str, Tensor], dim: int, pulses: int, rows: int, cols: int) -> Tensor:
    """Weights, float32 [rows, cols].

    Args:
        tensors: `codes` uint8 [rows, ceil(J · bits / 8)] with J = ceil(cols / dim) codes of a row,
            `levels` float32 [G].
    """
    num_tile_cols = -(-cols // dim)
    bits = tile_bits(dim, pulses, len(tensors["levels"]))
    codes_IJM = unpack_wide(tensors["codes"], bits, num_tile_cols)
    W_ND = decode_tiles(codes_IJM.flatten(0, 1), tensors["levels"], dim, pulses)
    return W_ND.reshape(len(codes_IJM), num_tile_cols * dim)[:rows, :cols]
