"""Format grouped-v1: scales of rows that also name one of several tables; bits in `reference`."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqllm_kernels.bitpack import MAX_WIDTH, packed_bytes
from vqllm_kernels.formats import FormatSpec, register
from vqllm_kernels.grouped import reference
from vqllm_kernels.layout import TensorLayout
from vqllm_kernels.tables import equal_entries

TILE_COLS = (1, 2, 4, 8)


@register
@dataclass(frozen=True, kw_only=True)
class GroupedSpec(FormatSpec):
    """`tile_cols` weights of a row in `index_bits`; rows in `groups` groups with a table each."""

    format_id: ClassVar[str] = "grouped-v1"

    tile_cols: int
    index_bits: int
    groups: int

    def __post_init__(self) -> None:
        if (
            self.tile_cols not in TILE_COLS
            or not 1 <= self.index_bits <= MAX_WIDTH
            or not 1 <= self.groups <= reference.MAX_GROUPS
        ):
            raise ValueError(
                f"{self.format_id}: tiles of {self.tile_cols} columns and {self.index_bits} bits "
                f"in {self.groups} groups; allowed are {', '.join(map(str, TILE_COLS))} columns, "
                f"1..{MAX_WIDTH} bits and 1..{reference.MAX_GROUPS} groups"
            )

    @property
    def tile(self) -> tuple[int, int]:
        return (1, self.tile_cols)

    def layout(self, rows: int, cols: int) -> dict[str, TensorLayout]:
        _, num_tile_cols = self.grid(rows, cols)
        codes = (rows, packed_bytes(num_tile_cols, self.index_bits))
        codebook = (self.groups, 1 << self.index_bits, self.tile_cols)
        return {
            "codes": TensorLayout(codes, torch.uint8, "codes", by_tile_row=True),
            "scale": TensorLayout((rows,), torch.bfloat16, "side", by_tile_row=True),
            "codebook": TensorLayout(codebook, torch.float16, "codebook"),
        }

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        return reference.decode(tensors, self.tile_cols, self.index_bits, rows, cols)

    def problem(self, tensors: dict[str, Tensor], rows: int, cols: int) -> str | None:
        stored = tensors["scale"].float()
        if problem := super().problem(tensors, rows, cols):
            return problem
        # The smallest normal number begins the band of group 0; every band is BAND octaves.
        low, high = 2.0**-126, 2.0 ** (reference.BAND * self.groups - 126)
        bad = int(((stored < low) | (stored >= high)).sum())
        if bad:
            return (
                f"{bad} of the {len(stored)} stored scales are outside {low:.4g}..{high:.4g}, and "
                f"so name none of the {self.groups} groups"
            )
        return equal_entries("codebook", tensors["codebook"])
