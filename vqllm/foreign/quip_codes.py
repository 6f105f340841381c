"""The codebooks of QuIP#, and the order of their codes in its files.

E8P12, 8 weights in 16 bits. With the high byte a and the low byte s of a code:

    p = parity of s           t = s with bit 0 flipped if p = 1
    w_i = ±A[a, i] + (1/4 if p = 0 else −1/4),  minus where bit `SIGN_BIT[i]` of t is set

A is `e8p_base`: 227 vectors of positive half-integers with squared norm at most 10 in
lexicographic order, then 29 of squared norm 12; coordinate 7 is negated where the sum is odd. The
format e8p-v1 of `vqllm_kernels` has the same 227 vectors, other 29, all in another order, and
negates coordinate 0: see `e8p_own_signs`.

Four codes of two rows by two columns stand in a word of 64 bits: a of them in its bytes 0 to 3,
rows first, and bit j of the s of code i in bit 32 + 4 j + i. The words of 16 rows by 8 codes stand
together, rows of words last.

E81B, 8 weights in 8 bits, is the second stage of 3 bits. D4 has 4 weights in 8 bits, HI4B1C one in
4 bits. Source: arXiv 2402.04396, and lib/codebook of Cornell-RelaxML/quip-sharp, whose branch
release20240109 has the last two.
"""

import itertools
from functools import cache

import torch
from torch import Tensor

SIGN_BIT = (0, 4, 1, 5, 2, 6, 3, 7)
"""The bit of s for each coordinate."""
SHELL_12 = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 167 157 147 156 146 045 067 "
    "057 047 056 046 014 237"
)
"""Which coordinates of the 29 vectors of five 3/2 and three 1/2 are 1/2."""
D4_BASE = (
    "1111 3333 1133 3311 1313 3131 1331 3113 3111 1311 1131 1113 1333 3133 3313 3331 "
    "5111 1511 1151 1115 3511 5311 5131 5113 3151 1351 1531 1513 3115 1315 1135 1153"
)
"""Twice the absolute values of D4, by the low five bits of a code."""
HI4_SHIFT = (28, 12, 24, 8, 20, 4, 16, 0)
"""Where the 4 bits of each of eight weights stand in a word of HI4B1C."""


def e8p_codes(words: Tensor) -> Tensor:
    """Codes of E8P12, int32 [R, n], from words, int64 [R, n / 4]; R divides by 16, n by 8."""
    num_rows, num_codes = len(words), 4 * words.shape[1]
    blocks = words.reshape(num_rows // 16, num_codes // 8, 8, 4)
    words = blocks.transpose(1, 2).reshape(num_rows // 2, num_codes // 2)
    codes = torch.empty(num_rows // 2, 2, num_codes // 2, 2, dtype=torch.int32)
    for i in range(4):
        code = ((words >> 8 * i) & 0xFF) << 8
        for j in range(8):
            code |= ((words >> (32 + 4 * j + i)) & 1) << j
        codes[:, i % 2, :, i // 2] = code.int()
    return codes.view(num_rows, num_codes)


@cache
def e8p_base() -> Tensor:
    """Twice A, int8 [256, 8]."""
    every = itertools.product((1, 3, 5), repeat=8)
    ball = [vector for vector in every if sum(c * c for c in vector) <= 40]
    shell = [[1 if str(i) in halves else 3 for i in range(8)] for halves in SHELL_12.split()]
    table = torch.tensor([*ball, *shell], dtype=torch.int8)
    table[_is_odd(table), 7] *= -1
    return table


def e8p_own_signs(codes: Tensor) -> Tensor:
    """The low byte of the same codeword in e8p-v1's order of signs, if its table has row a of
    |A| with coordinate 0 negated where the sum is odd: int32, of codes of any shape."""
    signs = torch.zeros_like(codes)
    for coordinate, bit in enumerate(SIGN_BIT):
        signs |= ((codes >> bit) & 1) << coordinate
    flips = 0x81 * _is_odd(e8p_base().abs()).int()  # coordinates 0 and 7
    return signs ^ flips[(codes >> 8).long()]


@cache
def e8p_codewords() -> Tensor:
    """float32 [65536, 8]."""
    codes = torch.arange(1 << 16)
    bits = (codes[:, None] >> torch.tensor(range(8))) & 1
    parity = bits.sum(1, keepdim=True) & 1
    bits[:, :1] ^= parity
    signs = 1 - 2 * bits[:, SIGN_BIT]
    return (2 * e8p_base()[codes >> 8] * signs + 1 - 2 * parity).float() / 4


@cache
def e81b_codewords() -> Tensor:
    """The origin and the 240 roots of E8, those of integers first, each in lexicographic order;
    then +2 e_i for i = 0..7 and −2 e_i for i = 0..6: float32 [256, 8]."""
    integers = [v for v in itertools.product((-1, 0, 1), repeat=8) if sum(map(abs, v)) in (0, 2)]
    halves = [v for v in itertools.product((-1, 1), repeat=8) if v.count(-1) % 2 == 0]
    eye = torch.eye(8)
    return torch.cat([torch.tensor(integers), torch.tensor(halves) / 2, 2 * eye, -2 * eye[:7]])


@cache
def d4_codewords() -> Tensor:
    """float32 [256, 4]: bits 5 and 6 of a code negate coordinates 2 and 1, then coordinate 3 is
    negated where the sum is odd, and all where bit 7 is set."""
    codes = torch.arange(256)
    base = torch.tensor([[int(digit) for digit in word] for word in D4_BASE.split()])
    table = base[codes & 31]
    table[:, 2] *= 1 - 2 * (codes >> 5 & 1)
    table[:, 1] *= 1 - 2 * (codes >> 6 & 1)
    table[_is_odd(table), 3] *= -1
    return (table * (1 - 2 * (codes[:, None] >> 7))).float() / 2


def d4_codes(stored: Tensor) -> Tensor:
    """Codes of D4, uint8 [R, n], from files, which have four codes of all rows after each other."""
    num_rows, num_codes = stored.shape
    return stored.view(num_codes // 4, num_rows, 4).transpose(0, 1).reshape(num_rows, num_codes)


def hi4_weights(words: Tensor) -> Tensor:
    """Weights of HI4B1C, float32 [R, 8 n], from words, int32 [R, n]."""
    return ((words[..., None] >> torch.tensor(HI4_SHIFT)) & 15).flatten(1).float() - 7.5


def _is_odd(twice: Tensor) -> Tensor:
    """Whether the sum of each vector of half-integers, an integer, is odd."""
    return twice.sum(1).long() // 2 % 2 == 1
