"""Integers of any width, packed without gaps along the last axis.

Bit order: symbol j occupies bits [j·width, (j+1)·width) of the row, bit k of a row is bit k % 8 of
byte k // 8 (least significant first). A row is padded with zero bits to a whole byte, so rows can
be split and stacked without re-coding. Width 8 is therefore plain uint8 and width 16
little-endian uint16.

Symbols of up to 16 bits are int32. Wider ones come as limbs of 16 bits along one more axis, the low
limb first.
"""

import torch
from torch import Tensor

MAX_WIDTH = 16
_AT_A_TIME = 1 << 22
"""Symbols at a time where only a number of them is wanted."""


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
    return _to_bytes(_bits(codes, width).flatten(-2))


def _bits(codes: Tensor, width: int) -> Tensor:
    """The bits of int32 codes, uint8 [..., width] of 0 and 1."""
    shifts = torch.arange(width, device=codes.device, dtype=torch.int32)
    return ((codes[..., None] >> shifts) & 1).to(torch.uint8)


def _to_bytes(bits: Tensor) -> Tensor:
    """Rows of bits, uint8 [..., n], as bytes [..., ceil(n/8)]."""
    num_bytes = (bits.shape[-1] + 7) // 8
    padding = num_bytes * 8 - bits.shape[-1]
    bits = torch.nn.functional.pad(bits, (0, padding)).unflatten(-1, (num_bytes, 8))
    weights = 1 << torch.arange(8, device=bits.device, dtype=torch.uint8)
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
    first = torch.arange(num_symbols, device=packed.device) * width
    return _windows(packed, first) & ((1 << width) - 1)


def pack_wide(limbs: Tensor, width: int) -> Tensor:
    """Pack integers in [0, 2^width), given as limbs, along the axis before the last.

    Args:
        limbs: integer tensor [..., J, ceil(width/16)]; limb m holds bits [16·m, 16·m + 16).
        width: bits of a symbol, 1 or more.

    Returns:
        uint8 tensor [..., ceil(J·width/8)].

    Raises:
        ValueError: another number of limbs, or a limb that does not fit.
    """
    widths = _limb_widths(width)
    if limbs.shape[-1] != len(widths):
        raise ValueError(
            f"symbols of {limbs.shape[-1]} limbs; {width} bits have {len(widths)} limbs of 16 bits"
        )
    limbs = limbs.to(torch.int32)
    limit = 1 << torch.tensor(widths, device=limbs.device, dtype=torch.int32)
    if bool(((limbs < 0) | (limbs >= limit)).any()):
        raise ValueError(f"symbols do not fit {width} bits")
    return _to_bytes(
        torch.cat([_bits(limbs[..., m], w) for m, w in enumerate(widths)], -1).flatten(-2)
    )


def unpack_wide(packed: Tensor, width: int, num_symbols: int) -> Tensor:
    """Inverse of `pack_wide`.

    Args:
        packed: uint8 tensor [..., ceil(num_symbols·width/8)].

    Returns:
        int32 tensor [..., num_symbols, ceil(width/16)].
    """
    want = packed_bytes(num_symbols, width)
    if packed.dtype != torch.uint8 or packed.shape[-1] != want:
        raise ValueError(
            f"packed codes are {packed.dtype} [..., {packed.shape[-1]}], expected uint8 "
            f"[..., {want}] for {num_symbols} symbols of {width} bits"
        )
    widths = torch.tensor(_limb_widths(width), device=packed.device, dtype=torch.int32)
    symbol = torch.arange(num_symbols, device=packed.device)[:, None]
    first = symbol * width + MAX_WIDTH * torch.arange(len(widths), device=packed.device)
    return _windows(packed, first) & ((1 << widths) - 1)


def count_beyond(packed: Tensor, width: int, num_symbols: int, limit: int) -> int:
    """How many of the packed symbols are `limit` or larger.

    Args:
        packed: uint8 tensor [rows, ceil(num_symbols·width/8)].
    """
    if limit >= 1 << width:
        return 0
    total = 0
    for part in packed.split(max(_AT_A_TIME // num_symbols, 1)):
        limbs = unpack_wide(part, width, num_symbols)
        beyond = torch.ones_like(limbs[..., 0], dtype=torch.bool)
        for m in range(limbs.shape[-1]):  # the last limb, the highest, decides first
            own = limit >> MAX_WIDTH * m & (1 << MAX_WIDTH) - 1
            beyond = (limbs[..., m] > own) | (limbs[..., m] == own) & beyond
        total += int(beyond.sum())
    return total


def _limb_widths(width: int) -> list[int]:
    """Bits of each limb of a symbol of `width` bits."""
    if width < 1:
        raise ValueError(f"width {width} is not at least 1")
    return [min(MAX_WIDTH, width - low) for low in range(0, width, MAX_WIDTH)]


def _windows(packed: Tensor, first: Tensor) -> Tensor:
    """The 16 bits or more from bit `first` on of each row of bytes, int32 [..., *first.shape]."""
    byte, shift = first // 8, (first % 8).to(torch.int32)
    # 16 bits lie inside three consecutive bytes.
    padded = torch.nn.functional.pad(packed, (0, 2)).to(torch.int32)
    window = padded[..., byte] | (padded[..., byte + 1] << 8) | (padded[..., byte + 2] << 16)
    return window >> shift
