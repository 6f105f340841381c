"""The bits of format sparse-v1: W is the weights of another format plus a few outliers a row.

With J columns of tiles of the base format, each tile_cols wide, every row of W has

    num = max(1, floor(share · J · tile_cols + 1/2))        in double precision

outliers. `outlier_columns` has their columns in ascending order, each in the bits that
J · tile_cols − 1 takes (at least one), packed as in `vqllm_kernels.bitpack`; `outlier_values` what
is added there, float16. Both have the rows of the padded matrix, those of a row of tiles together:
[I, tile_rows, ..]. The tensors of the base format carry the prefix `base_`.

The same number for every row costs no table of where rows begin, and lets rows be decoded, split
and stacked by themselves.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from vqllm_kernels.bitpack import MAX_WIDTH, pack_wide, unpack_wide

PREFIX = "base_"


class Base(Protocol):
    """What is needed of the base format."""

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor: ...


def num_outliers(share: float, num_cols: int) -> int:
    """Outliers of a row of `num_cols` columns, padding included."""
    return max(1, math.floor(share * num_cols + 0.5))


def index_bits(num_cols: int) -> int:
    """Bits of the column of an outlier."""
    return max(1, (num_cols - 1).bit_length())


def base_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the base format under their own names."""
    return {k.removeprefix(PREFIX): v for k, v in tensors.items() if k.startswith(PREFIX)}


def pack_columns(columns_RN: Tensor, num_cols: int) -> Tensor:
    """Columns of outliers, integers [.., N], as uint8 [.., ceil(N · index_bits / 8)]."""
    width = index_bits(num_cols)
    limbs = torch.stack(
        [columns_RN >> low & (1 << MAX_WIDTH) - 1 for low in range(0, width, MAX_WIDTH)], -1
    )
    return pack_wide(limbs, width)


def unpack_columns(packed: Tensor, num: int, num_cols: int) -> Tensor:
    """Inverse of `pack_columns`, int64 [.., num]."""
    limbs = unpack_wide(packed, index_bits(num_cols), num).long()
    shifts = MAX_WIDTH * torch.arange(limbs.shape[-1], device=packed.device)
    return (limbs << shifts).sum(-1)


def dense(columns_RN: Tensor, values_RN: Tensor, first: int, num_cols: int) -> Tensor:
    """The outliers in `num_cols` columns from `first` on, zero elsewhere: float32 [R, num_cols].

    Differentiable in the values; those that share a column add up.
    """
    place_RN = columns_RN.long() - first
    inside_RN = (place_RN >= 0) & (place_RN < num_cols)
    zeros_RC = torch.zeros(len(columns_RN), num_cols, device=values_RN.device)
    return zeros_RC.scatter_add(
        1, place_RN.clamp(0, num_cols - 1), values_RN.float() * inside_RN.float()
    )


def decode(
    tensors: dict[str, Tensor],
    base: Base,
    tile_cols: int,
    share: float,
    rows: int,
    cols: int,
) -> Tensor:
    """Weights, float32 [rows, cols]."""
    num_cols = -(-cols // tile_cols) * tile_cols
    num = num_outliers(share, num_cols)
    columns_RN = unpack_columns(tensors["outlier_columns"].flatten(0, 1)[:rows], num, num_cols)
    values_RN = tensors["outlier_values"].flatten(0, 1)[:rows]
    W_RC = base.decode(base_tensors(tensors), rows, cols)
    return W_RC + dense(columns_RN, values_RN, 0, num_cols)[:, :cols]
