"""Integers of any width from 1 to 16 bits, packed without gaps along the last axis.

Bit order: symbol j occupies bits [j·width, (j+1)·width) of the row, bit k of a row is bit k % 8 of
byte k // 8 (least significant first). A row is padded with zero bits to a whole byte, so rows can
be split and stacked without re-coding. Width 8 is therefore plain uint8 and width 16
little-endian uint16.
"""

import torch
from torch import Tensor

MAX_WIDTH = 16


def packed_bytes(num_symbols: int, width: int) -> int:
    """Bytes of a packed row of `num_symbols` symbols."""
    return (num_symbols * width + 7) // 8


def pack_bits(codes: Tensor, width: int) -> Tensor:
    """Pack integers in [0, 2^width) along the last axis.

    Args:
        codes: integer tensor [..., J].
        width: bits of a symbol, 1 to 16.

    Returns:
        uint8 tensor [..., ceil(J·width/8)].

    Raises:
        ValueError: a width out of range or a code that does not fit.
    """
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"width {width} is outside 1..{MAX_WIDTH}")
    codes = codes.to(torch.int32)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << width):
        raise ValueError(
            f"codes span {int(codes.min())}..{int(codes.max())}, allowed is 0..{(1 << width) - 1}"
        )
    num_bytes = packed_bytes(codes.shape[-1], width)
    shifts = torch.arange(width, device=codes.device, dtype=torch.int32)
    bits = ((codes[..., None] >> shifts) & 1).to(torch.uint8).flatten(-2)
    padding = num_bytes * 8 - bits.shape[-1]
    bits = torch.nn.functional.pad(bits, (0, padding)).unflatten(-1, (num_bytes, 8))
    weights = 1 << torch.arange(8, device=codes.device, dtype=torch.uint8)
    return (bits * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, width: int, num_symbols: int) -> Tensor:
    """Inverse of `pack_bits`.

    Args:
        packed: uint8 tensor [..., ceil(num_symbols·width/8)].

    Returns:
        int32 tensor [..., num_symbols].
    """
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"width {width} is outside 1..{MAX_WIDTH}")
    want = packed_bytes(num_symbols, width)
    if packed.dtype != torch.uint8 or packed.shape[-1] != want:
        raise ValueError(
            f"packed codes are {packed.dtype} [..., {packed.shape[-1]}], expected uint8 "
            f"[..., {want}] for {num_symbols} symbols of {width} bits"
        )
    if width == 8:
        return packed.to(torch.int32)
    # A symbol of up to 16 bits lies inside three consecutive bytes.
    first = torch.arange(num_symbols, device=packed.device) * width
    byte, shift = first // 8, (first % 8).to(torch.int32)
    padded = torch.nn.functional.pad(packed, (0, 2)).to(torch.int32)
    window = padded[..., byte] | (padded[..., byte + 1] << 8) | (padded[..., byte + 2] << 16)
    return (window >> shift) & ((1 << width) - 1)
