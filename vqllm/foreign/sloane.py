"""The Hadamard transforms of QuIP# and QTIP: H ⊗ S, a core H of the largest order in `CORES` that
divides the number of features, and Sylvester's matrix S of what is left, a power of two.

The cores are those of N. J. A. Sloane's tables that these tools carry. They follow three
constructions, and are made by them here:

    12, 20, 60, 108, 140      Paley I, of the squares modulo the order − 1
    28, 36                    Paley II, of the squares modulo half the order − 1
    52, 116, 124, 156, 172    Williamson, of four symmetric circulants

Sources: http://www.neilsloane.com/hadamard; lib/utils/matmul_had.py of Cornell-RelaxML/quip-sharp.
"""

import math
from functools import cache

import torch
from torch import Tensor

from vqllm_kernels.hadamard import reference
from vqllm_kernels.hadamard.galois import quadratic_character

CORES = (172, 156, 140, 124, 116, 108, 60, 52, 36, 28, 20, 12)
WILLIAMSON = {
    52: (0x0D, 0x07, 0x1A, 0x2F),
    116: (0x08B6, 0x0748, 0x059D, 0x359C),
    124: (0x3DA3, 0x3DA3, 0x351F, 0x4AE0),
    156: (0x66FAC, 0x579B8, 0x6D74C, 0x23EA7),
    172: (0x122867, 0x09AF02, 0x1A1594, 0x1E6D0E),
}
"""Order 4m -> four symmetric ±1 sequences of length m: bit i − 1 is set where element i (and m − i)
is −1, 1 <= i <= m / 2; element 0 is 1."""


def core_of(features: int) -> int | None:
    """The order of the core, 1 without one; None where what is left is no power of two."""
    core = next((core for core in CORES if features % core == 0), 1)
    left = features // core
    return core if left & (left - 1) == 0 else None


def transform(v: Tensor, core: int, block: int) -> Tensor:
    """(H ⊗ S) v along the last axis, orthonormal, in blocks of so many features.

    Args:
        v: float32 [N, features].
        core: order of H.
        block: `core` times a power of two; divides the features.
    """
    v = reference.transform(v, block // core)
    if core == 1:
        return v
    H = signs(core).float() / math.sqrt(core)
    return (H @ v.unflatten(-1, (-1, core, block // core))).flatten(1)


@cache
def signs(core: int) -> Tensor:
    """The ±1 of a core, int8 [core, core]."""
    if core in WILLIAMSON:
        return _williamson(core)
    if core in (28, 36):
        return _paley2(core // 2 - 1)
    return _paley1(core - 1)


def _paley1(q: int) -> Tensor:
    H = torch.ones(q + 1, q + 1, dtype=torch.int8)
    H[0, 1:] = -1
    H[1:, 1:] = quadratic_character(q) + torch.eye(q, dtype=torch.int8)
    return H


def _paley2(q: int) -> Tensor:
    C = torch.ones(q + 1, q + 1, dtype=torch.int8).fill_diagonal_(0)
    C[1:, 1:] = quadratic_character(q)
    eye = torch.eye(q + 1, dtype=torch.int8)
    return torch.cat([torch.cat([C + eye, C - eye], 1), torch.cat([C - eye, -C - eye], 1)])


def _williamson(order: int) -> Tensor:
    m = order // 4
    t = torch.arange(m)
    distance = torch.minimum(t, m - t)
    blocks = []
    for mask in WILLIAMSON[order]:
        sequence = 1 - 2 * ((mask >> (distance - 1).clamp(min=0)) & (distance > 0)).to(torch.int8)
        blocks.append(sequence[(t - t[:, None]) % m])
    A, B, C, D = blocks
    rows = [(A, B, C, D), (-B, A, -D, C), (-C, D, A, -B), (-D, -C, B, A)]
    return torch.cat([torch.cat(row, 1) for row in rows])
