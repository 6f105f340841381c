"""Format lut-v1: 1 to 16 bits a tile and a table of float16; the bits are in `reference`."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqllm_kernels.bitpack import MAX_WIDTH, packed_bytes
from vqllm_kernels.formats import FormatSpec, register
from vqllm_kernels.layout import TensorLayout
from vqllm_kernels.lut import reference


@register
@dataclass(frozen=True, kw_only=True)
class LutSpec(FormatSpec):
    """Tiles of `tile_rows` x `tile_cols` weights, `index_bits` a tile, one table a linear."""

    format_id: ClassVar[str] = "lut-v1"

    tile_rows: int
    tile_cols: int
    index_bits: int

    def __post_init__(self) -> None:
        if self.tile_rows < 1 or self.tile_cols < 1 or not 1 <= self.index_bits <= MAX_WIDTH:
            raise ValueError(
                f"{self.format_id}: tile {self.tile} of {self.index_bits} bits; a tile has at "
                f"least one row and column and 1..{MAX_WIDTH} bits"
            )

    @property
    def tile(self) -> tuple[int, int]:
        return (self.tile_rows, self.tile_cols)

    def layout(self, rows: int, cols: int) -> dict[str, TensorLayout]:
        num_tile_rows, num_tile_cols = self.grid(rows, cols)
        codes = (num_tile_rows, packed_bytes(num_tile_cols, self.index_bits))
        codebook = (1 << self.index_bits, self.tile_rows * self.tile_cols)
        return {
            "codes": TensorLayout(codes, torch.uint8, "codes", by_tile_row=True),
            "codebook": TensorLayout(codebook, torch.float16, "codebook"),
        }

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        return reference.decode(tensors, self.tile, self.index_bits, rows, cols)
