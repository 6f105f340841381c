"""The bits of formats e8p-v1 and e81b-v1: eight consecutive weights of a row in one code.

e8p-v1, 2 bits a weight: 65536 points of the shifted lattice E8 + 1/4 inside a ball, two cosets of
D8 + 1/2, shifted by +1/4 and by −1/4. With the high byte a and the low byte s of the code:

    p = parity of s           t = s with bit 0 flipped if p = 1     (so t has even parity)
    w_i = ±A[a, i] + (1/4 if p = 0 else −1/4),  minus where bit i of t is set,   i = 0..7

A is `base_table`: 256 vectors of positive half-integers, coordinate 0 negated where the sum of the
vector is odd, so that every ±A with an even number of flips has an even sum.

e81b-v1, 1 bit a weight: the origin, the 240 roots of E8 and 15 of the 16 vectors ±2 e_i.

Both: W = scale · w. Tables are small integers (twice the value) so that any reader holds them
exactly.

Source: QuIP#, arXiv 2402.04396, section 4 (E8P and the 1-bit E8 codebook).
"""

import itertools
from functools import cache

import torch
from torch import Tensor

NUM_SHELL_12 = 29
"""Vectors of squared norm 12 that fill the 227 of norm at most 10 up to 256."""


@cache
def abs_table() -> Tensor:
    """Twice the absolute values of the codewords before the shift, int8 [256, 8] of 1, 3 and 5.

    First all 227 vectors of positive half-integers with squared norm at most 10, ordered by squared
    norm, then lexicographically. Then 29 of the 56 with five 3/2 and three 1/2 (squared norm 12),
    the first in the order of (sum of the positions of the three 1/2) mod 8, then
    lexicographically: neighbours in that shell are rarely both taken, which lowers the distortion
    of a Gaussian by 0.16 % against the lexicographically last 29.
    """
    ball = [v for v in itertools.product((1, 3, 5), repeat=8) if sum(c * c for c in v) <= 40]
    ball.sort(key=lambda v: (sum(c * c for c in v), v))
    shell = [v for v in itertools.product((1, 3), repeat=8) if v.count(3) == 5]
    shell.sort(key=lambda v: (sum(i for i in range(8) if v[i] == 1) % 8, v))
    return torch.tensor(ball + shell[:NUM_SHELL_12], dtype=torch.int8)


@cache
def base_table() -> Tensor:
    """Twice A: `abs_table` with coordinate 0 negated where the sum is odd, int8 [256, 8]."""
    table = abs_table().clone()
    odd_sum = (table.sum(1) // 2) % 2 == 1
    table[odd_sum, 0] *= -1
    return table


@cache
def codeword_table(device: torch.device) -> Tensor:
    """All codewords of e8p-v1, unscaled, float32 [65536, 8]: row c is the point of code c."""
    codes = torch.arange(1 << 16, dtype=torch.int32)
    bits = (codes[:, None] >> torch.arange(8)) & 1
    parity = bits.sum(1, keepdim=True) & 1
    bits[:, :1] ^= parity
    signs = 1 - 2 * bits
    base = base_table()[codes >> 8].to(torch.int32)
    return ((2 * base * signs + 1 - 2 * parity).float() / 4).to(device)


@cache
def e81b_table() -> Tensor:
    """Twice the codewords of e81b-v1, int8 [256, 8].

    0: the origin. 1..112: ±e_i ±e_j, pairs i < j in lexicographic order, the four signs of a pair
    in the order ++, −+, +−, −−. 113..240: (±1/2)^8 with an even number of minus signs, in the
    order of the sign pattern read as a number with bit i for coordinate i. 241..255: +2e_0, −2e_0,
    +2e_1, ... +2e_7 (−2e_7 is the one that is left out).
    """
    table = torch.zeros(256, 8, dtype=torch.int8)
    row = 1
    for i, j in itertools.combinations(range(8), 2):
        for sign_j, sign_i in itertools.product((1, -1), repeat=2):
            table[row, i], table[row, j] = 2 * sign_i, 2 * sign_j
            row += 1
    for pattern in range(256):
        if pattern.bit_count() % 2 == 0:
            table[row] = torch.tensor([1 - 2 * (pattern >> i & 1) for i in range(8)])
            row += 1
    for i, sign in list(itertools.product(range(8), (1, -1)))[:15]:
        table[row, i] = 4 * sign
        row += 1
    return table


@cache
def e81b_codeword_table(device: torch.device) -> Tensor:
    """All codewords of e81b-v1, unscaled, float32 [256, 8]."""
    return (e81b_table().float() / 2).to(device)


def codewords(codes: Tensor) -> Tensor:
    """Unscaled points of e8p-v1, float32 [..., 8], of integer codes (16 low bits used)."""
    return torch.nn.functional.embedding(
        codes.to(torch.int32) & 0xFFFF, codeword_table(codes.device)
    )


def e81b_codewords(codes: Tensor) -> Tensor:
    """Unscaled points of e81b-v1, float32 [..., 8], of codes 0..255."""
    return torch.nn.functional.embedding(codes.to(torch.int32), e81b_codeword_table(codes.device))


def decode(tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor:
    """Weights of e8p-v1, float32 [rows, cols].

    Args:
        tensors: `codes` int16 [rows, ceil(cols/8)], `scale` float32 [1].
    """
    return (codewords(tensors["codes"]) * tensors["scale"]).flatten(1)[:rows, :cols]


def decode_e81b(tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor:
    """Weights of e81b-v1, float32 [rows, cols].

    Args:
        tensors: `codes` uint8 [rows, ceil(cols/8)], `scale` float32 [1].
    """
    return (e81b_codewords(tensors["codes"]) * tensors["scale"]).flatten(1)[:rows, :cols]
