"""The bits of format split-v1: the first columns of W in one format, the rest in another.

The tile is the smallest that whole tiles of both formats fill: its height is the least common
multiple of their heights, its width that of their widths. Of the J columns of tiles the first

    num_first = min(max(1, floor(share · J + 1/2)), J − 1)    in double precision

belong to the part `first`, the others to `rest`. A part is stored as a matrix of I · tile_rows rows
and num · tile_cols columns; `first` as one of tile_cols columns, of which nothing is read, where it
has none (J = 1). Its tensors carry the prefix `first_` or `rest_`. Those with an axis of tile rows
have the shape [I, tile_rows / height, ..] in place of [I · tile_rows / height, ..], where height is
that of the part's own tile: their first axis, too, counts the tiles of the whole.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from vqllm_kernels.layout import TensorLayout

PARTS = ("first", "rest")


class Part(Protocol):
    """What is needed of the format of a part."""

    @property
    def tile(self) -> tuple[int, int]: ...

    def layout(self, rows: int, cols: int) -> dict[str, TensorLayout]: ...

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor: ...


def common_tile(parts: Sequence[Part]) -> tuple[int, int]:
    """The smallest tile that whole tiles of all parts fill."""
    return math.lcm(*(part.tile[0] for part in parts)), math.lcm(*(part.tile[1] for part in parts))


def num_columns(share: float, num_tile_cols: int) -> tuple[int, int]:
    """How many columns of tiles belong to each part."""
    num_first = min(max(1, math.floor(share * num_tile_cols + 0.5)), num_tile_cols - 1)
    return num_first, num_tile_cols - num_first


def part_tensors(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors of one part under their own names."""
    prefix = f"{part}_"
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def stacked(tensors: dict[str, Tensor], part: Part, tile_rows: int) -> dict[str, Tensor]:
    """A part's tensors as they are stored in the split format."""
    layout, per_tile = part.layout(*part.tile), tile_rows // part.tile[0]
    return {
        name: tensor.unflatten(0, (-1, per_tile)) if layout[name].by_tile_row else tensor
        for name, tensor in tensors.items()
    }


def unstacked(tensors: dict[str, Tensor], part: Part) -> dict[str, Tensor]:
    """Inverse of `stacked`."""
    layout = part.layout(*part.tile)
    return {
        name: tensor.flatten(0, 1) if layout[name].by_tile_row else tensor
        for name, tensor in tensors.items()
    }


def decode(
    tensors: dict[str, Tensor], parts: Sequence[Part], share: float, rows: int, cols: int
) -> Tensor:
    """Weights, float32 [rows, cols]."""
    tile_rows, tile_cols = common_tile(parts)
    num_tile_rows, num_tile_cols = -(-rows // tile_rows), -(-cols // tile_cols)
    decoded = []
    for name, part, num in zip(PARTS, parts, num_columns(share, num_tile_cols)):
        if num:
            own = unstacked(part_tensors(tensors, name), part)
            decoded.append(part.decode(own, num_tile_rows * tile_rows, num * tile_cols))
    return torch.cat(decoded, 1)[:rows, :cols]
