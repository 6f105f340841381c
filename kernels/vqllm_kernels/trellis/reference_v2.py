"""The bits of format trellis-v2: a trellis whose states lead to the entries of a small table.

Tiles, ring, steps and states are those of trellis-v1 with V = 1 (`reference`): the state of weight
t of a tile is the number made of the L = `state_bits` bits of the ring before bit
e(t) = (t + 1) · `tile_bits` // 256, the oldest bit the most significant. Then

    bit i of the index of state s    the parity of the number of ones in s & masks[i]
    weight                           table[index] · scale

for i = 0 (the lowest bit) to K - 1, K = len(`masks`). The table is int8 [2^K, 1], the scale float32
[1]. So the index is K linear functions of the state over GF(2), the field of two elements.

A weight is one int8 times the scale of the matrix: products with x in bytes are exact sums of
integers. A shift or a mask is not needed to find the index: bits that do not belong to the state
are not in the masks, and moved masks take bits from where they lie (one or two matrix-vector
products over GF(2) a byte, the instruction GF2P8AFFINEQB).
"""

from functools import cache

import torch
from torch import Tensor

from vqllm_kernels.trellis import reference


def indices(masks: tuple[int, ...], states: Tensor) -> Tensor:
    """The entry of the table that each state takes, int64 [...], of states int64 [...]."""
    index = torch.zeros_like(states)
    for i, mask in enumerate(masks):
        ones = states & mask
        for shift in (8, 4, 2, 1):
            ones = ones ^ (ones >> shift)
        index |= (ones & 1) << i
    return index


@cache
def index_of_states(masks: tuple[int, ...], state_bits: int, device: torch.device) -> Tensor:
    """The entry of every state, int64 [2^L]."""
    with torch.inference_mode(False):
        return indices(masks, torch.arange(1 << state_bits, device=device))


def values(masks: tuple[int, ...], state_bits: int, table_K1: Tensor) -> Tensor:
    """The values of all states before the scale, float32 [2^L, 1]; the table in any dtype."""
    index_S = index_of_states(masks, state_bits, table_K1.device)
    return torch.nn.functional.embedding(index_S, table_K1.float())


def decode(
    tensors: dict[str, Tensor],
    tile: tuple[int, int],
    tile_bits: int,
    state_bits: int,
    masks: tuple[int, ...],
    rows: int,
    cols: int,
) -> Tensor:
    """Weights, float32 [rows, cols].

    Args:
        tensors: `codes` int16 (bit patterns) [I, J, tile_bits / 16]; `table` int8 [2^K, 1]; `scale`
            float32 [1].
        tile: (rows, cols) of a tile; I and J are the numbers of tiles, rounded up.
    """
    codes = tensors["codes"].to(torch.int32) & 0xFFFF
    values_S1 = values(masks, state_bits, tensors["table"])
    X_IJE = reference.decode_tiles(codes, values_S1, tensors["scale"], tile_bits, state_bits)
    return reference.matrix(X_IJE, tile, rows, cols)
