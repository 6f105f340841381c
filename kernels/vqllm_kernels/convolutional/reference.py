"""The bits of format convolutional-v1: the weights of a tile are windows of bits of one integer.

A code k of `index_bits` bits stands for d = `tile_cols` consecutive weights of a row. With a and c,
the scale and the offset of the row's codes in sixteenths,

    v = (a k + c) >> 4                                       a linear function, no table
    u_e = ((v >> shift (d − 1 − e)) & (2^window − 1)) − 2^(window − 1)              e = 0 .. d − 1

    window 6, shift 3, d = 4:  bit of v   14 13 12 11 10  9  8  7  6  5  4  3  2  1  0
                               u_0         x  x  x  x  x  x
                               u_1                  x  x  x  x  x  x
                               u_2                           x  x  x  x  x  x
                               u_3                                    x  x  x  x  x  x

Neighbours share window − shift bits, as in a convolutional code: the last bits of one weight are
the first bits of the next. Bits of v above those of u_0 mean nothing. Then

    levels linear:  w = u               levels cubic:  w = u (1 + 5 u² / 2^(2 window + 1))
    W = (group_scale · super_scale) · w

group_scale is an integer, one for `group` columns; super_scale belongs to the row. All before
super_scale is exact in int32, and in float32 in any order of operations while a k + c < 2^24 (a
reader may compute floor(k · a/16 + c/16)).

Source: CCQ, arXiv 2507.07145, which has window 6, shift 3, d = 4, 8 bits, linear levels, group 64,
and a/16, c/16 as float32.
"""

import torch
from torch import Tensor

from vqllm_kernels.bitpack import unpack_bits

FRACTION_BITS = 4
"""Bits of a and c below the point. Whole numbers are 0.6 % worse at 8 bits, 8 bits no better."""
LIMIT = 1 << 24
"""a k + c is below this, and not negative."""
SCALE_BITS = 4
"""Bits of a group scale."""
_CURVE = 5


def weights(
    codes_IJ: Tensor, code_map_I2: Tensor, tile_cols: int, window: int, shift: int, levels: str
) -> Tensor:
    """w of codes, float32 [I, J, tile_cols].

    Args:
        codes_IJ: int32.
        code_map_I2: int32, a and c of each row.
        levels: "linear" or "cubic".
    """
    v_IJ = (codes_IJ * code_map_I2[:, :1] + code_map_I2[:, 1:]) >> FRACTION_BITS
    place_E = torch.arange(tile_cols - 1, -1, -1, dtype=torch.int32, device=v_IJ.device)
    u_IJE = ((v_IJ[..., None] >> shift * place_E) & ((1 << window) - 1)) - (1 << window - 1)
    if levels == "linear":
        return u_IJE.float()
    one = 1 << 2 * window + 1
    return (u_IJE * (one + _CURVE * u_IJE * u_IJE)).float() / one


def scales(
    group_scale_IG: Tensor, super_scale_I: Tensor, group_tiles: int | None, col: int, num: int
) -> Tensor:
    """The scales of `num` tile columns, the first of which is `col`: float32 [I, num].

    Args:
        group_scale_IG: integers.
        super_scale_I: float32.
        group_tiles: tile columns that share a group scale; None is all.
    """
    column_J = torch.arange(col, col + num, device=super_scale_I.device)
    group_J = column_J // group_tiles if group_tiles else torch.zeros_like(column_J)
    return group_scale_IG[:, group_J].float() * super_scale_I[:, None]


def decode(
    tensors: dict[str, Tensor],
    index_bits: int,
    tile_cols: int,
    window: int,
    shift: int,
    levels: str,
    group: int | None,
    rows: int,
    cols: int,
) -> Tensor:
    """Weights, float32 [rows, cols].

    Args:
        tensors: `codes` uint8 [rows, packed_bytes(J, index_bits)], the J = ceil(cols/tile_cols)
            codes of a row packed as in `bitpack`; `code_map` int32 [rows, 2]; `group_scale` uint8
            [rows, packed_bytes(G, 4)], the G = ceil(cols/group) group scales of a row, packed
            likewise; `super_scale` float32 [rows].
        group: columns that share a group scale, whole tiles; None is all.
    """
    num_tiles = -(-cols // tile_cols)
    codes_IJ = unpack_bits(tensors["codes"], index_bits, num_tiles)
    num_groups = -(-cols // (group or cols))
    group_scale_IG = unpack_bits(tensors["group_scale"], SCALE_BITS, num_groups)
    group_tiles = group // tile_cols if group else None
    scale_IJ = scales(group_scale_IG, tensors["super_scale"], group_tiles, 0, num_tiles)
    w_IJE = weights(codes_IJ, tensors["code_map"], tile_cols, window, shift, levels)
    return (scale_IJ[..., None] * w_IJE).flatten(1)[:rows, :cols]
