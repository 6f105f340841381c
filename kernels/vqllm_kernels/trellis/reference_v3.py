"""The bits of format trellis-v3: a trellis with an order of its own in a tile, and fixed numbers.

Ring, steps and states are those of trellis-v1 with V = 1 (`reference`): the state of step t of a
tile is the number made of the L = `state_bits` bits of the ring before bit
e(t) = (t + 1) · `tile_bits` // 256, the oldest bit the most significant.

The weight of step t stands at place p of the tile of `tile_rows` rows, row-major, where

    bit k of t is bit `places`[k] of p,

so that (0, 1, ..., 7) is the order of trellis-v1. A weight is the value of its state times `scale`,
float32 [1]. The values are not brought to zero mean and unit variance. With 32-bit unsigned
arithmetic for x, and all numbers that follow exact in float32:

    3inst   x = 89226354 s + 64248484; y = (x & 0x8FFF8FFF) ^ 0x3B603B60; the sum of the two halves
            of y, read as float16
    mcg     x = 0xCBAC1FED s; then as 3inst
    mul1    x = 0x83DCD12D s; a · (b + 1024) + c, b the sum of the four bytes of x, and a and c the
            float16 with the bits 0x1EEE and 0xC931: close to (b - 510) / 147.8

Source: the codes of EXL3, exllamav3 1.6.5, which rounds the values to float16 once more.
"""

from functools import cache

import torch
from torch import Tensor

from vqllm_kernels.trellis import reference
from vqllm_kernels.trellis.reference import Moments

HALVES = {"3inst": (89226354, 64248484), "mcg": (0xCBAC1FED, 0)}
"""Factor and summand of the codes whose values are sums of two float16."""
CODES = (*HALVES, "mul1")
SCALE, CENTRE = 1774 / (1 << 18), -1329 / (1 << 7)
"""a and c of mul1."""

_U32 = 0xFFFFFFFF


@cache
def values(code: str, state_bits: int, device: torch.device) -> Tensor:
    """The values of all states before the scale, float32 [2^L, 1]."""
    states = torch.arange(1 << state_bits, dtype=torch.int64)
    if code == "mul1":
        found = (reference.byte_sums("mul1", states) + 512 + 1024).double() * SCALE + CENTRE
    else:
        factor, summand = HALVES[code]
        found = reference.sums_of_halves((factor * states + summand) & _U32)[..., None]
    with torch.inference_mode(False):
        return found.float().to(device)


def moments() -> Moments:
    """What turns sums of signed bytes of mul1 (`reference.byte_sums`) into values."""
    return Moments((-CENTRE / SCALE - 1024 - 512,), (1 / SCALE,))


def step_of_place(places: tuple[int, ...]) -> list[int]:
    """The step whose weight stands at each place of a tile, row-major."""
    steps = [0] * reference.WEIGHTS
    for t in range(reference.WEIGHTS):
        steps[sum((t >> k & 1) << bit for k, bit in enumerate(places))] = t
    return steps


def decode(
    tensors: dict[str, Tensor],
    code: str,
    tile: tuple[int, int],
    tile_bits: int,
    state_bits: int,
    places: tuple[int, ...],
    rows: int,
    cols: int,
) -> Tensor:
    """Weights, float32 [rows, cols].

    Args:
        tensors: `codes` int16 (bit patterns) [I, J, tile_bits / 16]; `scale` float32 [1].
        tile: (rows, cols) of a tile; I and J are the numbers of tiles, rounded up.
    """
    codes = tensors["codes"].to(torch.int32) & 0xFFFF
    values_S1 = values(code, state_bits, codes.device)
    X_IJT = reference.decode_tiles(codes, values_S1, tensors["scale"], tile_bits, state_bits)
    return reference.matrix(X_IJT[..., step_of_place(places)], tile, rows, cols)
