"""The bits of format d4-v1: four consecutive weights of a row in one byte.

The 256 points are all vectors of half-integers with an even sum and a squared norm of at most 9, a
ball of the lattice D4 shifted by (1/2, 1/2, 1/2, 1/2). With the five high bits a and the three low
bits s of the code:

    w_i = ±A[a, i],  minus for i = 1, 2, 3 where bit i − 1 of s is set,
                     minus for i = 0 where the sum of w is not even otherwise

A is `abs_table`. W = scale · w. The table is of small integers (twice the value) so that any reader
holds it exactly.

Source: the first release of QuIP#, arXiv 2402.04396.
"""

import itertools
from functools import cache

import torch
from torch import Tensor


@cache
def abs_table() -> Tensor:
    """Twice A: int8 [32, 4] of 1, 3 and 5, by squared norm, then lexicographically."""
    ball = [v for v in itertools.product((1, 3, 5), repeat=4) if sum(c * c for c in v) <= 36]
    ball.sort(key=lambda v: (sum(c * c for c in v), v))
    return torch.tensor(ball, dtype=torch.int8)


@cache
def codeword_table(device: torch.device) -> Tensor:
    """All codewords, unscaled, float32 [256, 4]: row c is the point of code c."""
    codes = torch.arange(256)
    twice = abs_table().to(torch.int64)[codes >> 3]
    twice[:, 1:] *= 1 - 2 * (codes[:, None] >> torch.arange(3) & 1)
    # Turning the sign of a half-integer changes the sum by an odd number.
    twice[:, 0] *= 1 - twice.sum(1) // 2 % 2 * 2
    return (twice.float() / 2).to(device)


def codewords(codes: Tensor) -> Tensor:
    """Unscaled points, float32 [..., 4], of codes 0..255."""
    return torch.nn.functional.embedding(codes.to(torch.int32), codeword_table(codes.device))


def decode(tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor:
    """Weights, float32 [rows, cols].

    Args:
        tensors: `codes` uint8 [rows, ceil(cols/4)], `scale` float32 [1].
    """
    return (codewords(tensors["codes"]) * tensors["scale"]).flatten(1)[:rows, :cols]
