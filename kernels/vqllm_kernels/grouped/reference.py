"""The bits of format grouped-v1: every tile of a row is an entry of the look-up table of its group.

A row has a scale, and belongs to one of up to eight groups. No tensor says to which: a stored scale
is a bfloat16 number, whose range is divided into eight bands of 31 powers of two, one for a group,

    g = floor((log2(stored) + 126) / 31)        scale = stored · 2^(105 − 31 g)

and a tile is W = scale · codebook[g, index]. So the thresholds between groups are 2^(31 g − 126),
and a scale is in [2^-21, 2^10) once the place of its band is taken off. In bits, with the exponent
field f of the stored number (bits 7..14, 1..248): g = (f − 1) // 31, and the scale has the field
(f − 1) % 31 + 106 and the same mantissa. The sign is not used.

A row is decoded from its own codes and scale, wherever it stands in the matrix.
"""

import torch
from torch import Tensor

from vqllm_kernels.bitpack import unpack_bits

MAX_GROUPS = 8
BAND = 31
"""Powers of two in the band of a group."""
SMALLEST_SCALE = 2.0**-21
LARGEST_SCALE = 2.0**10 - 4
"""The largest bfloat16 number below 2^10."""

_FIELD = 1 << 7
"""One step of a bfloat16 number's exponent."""
_SMALLEST_FIELD = 127 - 21
"""The exponent field of SMALLEST_SCALE."""


def join(scale_I: Tensor, group_I: Tensor) -> Tensor:
    """Stored scales, bfloat16 [I].

    Args:
        scale_I: bfloat16, from SMALLEST_SCALE to LARGEST_SCALE.
        group_I: uint8, below MAX_GROUPS.
    """
    steps_I = 1 - _SMALLEST_FIELD + BAND * group_I.to(torch.int16)
    return (_bits(scale_I) + steps_I * _FIELD).view(torch.bfloat16)


def split(stored_I: Tensor) -> tuple[Tensor, Tensor]:
    """Scales, bfloat16 [I], and groups, uint8 [I], of stored scales: the inverse of `join`."""
    bits_I = _bits(stored_I)
    group_I = ((bits_I >> 7) - 1) // BAND
    steps_I = _SMALLEST_FIELD - 1 - BAND * group_I
    return (bits_I + steps_I * _FIELD).view(torch.bfloat16), group_I.to(torch.uint8)


def _bits(numbers: Tensor) -> Tensor:
    return numbers.detach().contiguous().view(torch.int16)


def reproduce(index_IJ: Tensor, scale_I: Tensor, group_I: Tensor, codebook_GKE: Tensor) -> Tensor:
    """The tiles of indices, float32 [I, J, E].

    Args:
        index_IJ: integers in [0, K).
        scale_I: any floating dtype.
        group_I: integers in [0, G).
        codebook_GKE: any floating dtype.
    """
    entry_IJ = group_I[:, None].to(torch.int64) * codebook_GKE.shape[1] + index_IJ
    table_PE = codebook_GKE.float().flatten(0, 1)
    return torch.nn.functional.embedding(entry_IJ, table_PE) * scale_I.float()[:, None, None]


def decode(
    tensors: dict[str, Tensor], tile_cols: int, index_bits: int, rows: int, cols: int
) -> Tensor:
    """Weights, float32 [rows, cols].

    Args:
        tensors: `codes` uint8 [rows, packed_bytes(J, index_bits)], the indices of a row of tiles
            packed as in `bitpack`; `scale` bfloat16 [rows], as stored; `codebook` float16
            [G, 2^index_bits, tile_cols].
        tile_cols: consecutive weights of a row in a tile; J is the number of tiles, rounded up.
    """
    index_IJ = unpack_bits(tensors["codes"], index_bits, -(-cols // tile_cols))
    scale_I, group_I = split(tensors["scale"])
    return reproduce(index_IJ, scale_I, group_I, tensors["codebook"]).flatten(1)[:rows, :cols]
