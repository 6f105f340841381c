"""The values that the states of QTIP's trellis have.

Source: arXiv 2406.11235, and lib/codebook/bitshift.py of Cornell-RelaxML/qtip.
"""

import torch
from torch import Tensor

from vqllm_kernels.trellis import reference

TABLES = ("lut", "quantlut", "quantlut_sym")
"""Modes that have a table."""
MODES = ("1mad", "2mad", "3inst", *TABLES)
_WORD = 0xFFFFFFFF
_UNIT = 147.800537109375
"""Standard deviation of the sum of four bytes, as QTIP rounds it."""


def values(mode: str, state_bits: int, table_bits: int, table: Tensor | None) -> Tensor:
    """The value of each state, float32 [2^state_bits, V].

    Args:
        table: float32 [2^table_bits, V], with a mode that has one.
    """
    state = torch.arange(1 << state_bits)
    if table is None:
        return {"1mad": _one_mad, "2mad": _two_mads, "3inst": _three_instructions}[mode](state)
    if mode == "lut":
        return table
    hashed = state * (state + 1)
    if mode == "quantlut":
        return table[hashed >> (16 - table_bits) & (1 << table_bits) - 1]
    found = table[hashed >> (15 - table_bits) & (1 << table_bits) - 1]
    sign = 1 - 2 * (hashed >> 15 & 1)
    return torch.stack([found[:, 0] * sign, found[:, 1]], 1)


def _one_mad(state: Tensor) -> Tensor:
    return _scaled(reference.byte_sums("1mad", state) + 512)


def _two_mads(state: Tensor) -> Tensor:
    first = state * 264435761 + 1013904223 & _WORD
    word = (first * 1664525 >> 32) + first & _WORD
    return _scaled(torch.stack([word >> shift & 255 for shift in (0, 8, 16, 24)]).sum(0)[:, None])


def _three_instructions(state: Tensor) -> Tensor:
    return reference.raw_values("3inst", state).float()


def _scaled(sums: Tensor) -> Tensor:
    """Values of sums of four bytes."""
    return (sums - 510).float() / _UNIT
