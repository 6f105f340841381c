"""Format convolutional-v1: 1 to 12 bits for 2 to 4 weights; the bits are in `reference`."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqllm_kernels.bitpack import packed_bytes
from vqllm_kernels.convolutional import reference
from vqllm_kernels.formats import FormatSpec, register
from vqllm_kernels.layout import TensorLayout

LEVELS = ("linear", "cubic")
MAX_SPAN = 19
"""Bits of v: with the fraction and a carry 24, which float32 holds."""


@register
@dataclass(frozen=True, kw_only=True)
class ConvolutionalSpec(FormatSpec):
    """`tile_cols` weights of a row in `index_bits` bits; a scale for each `group` columns of a row
    (None: the whole row), in units of one for the row."""

    format_id: ClassVar[str] = "convolutional-v1"

    index_bits: int
    tile_cols: int
    window: int
    shift: int
    levels: str
    group: int | None

    def __post_init__(self) -> None:
        def refuse(what: str, allowed: str) -> None:
            raise ValueError(f"{self.format_id}: {what}; allowed are {allowed}")

        if not 2 <= self.tile_cols <= 4:
            refuse(f"tile_cols {self.tile_cols}", "2..4")
        if not 2 <= self.window <= 8 or not 1 <= self.shift <= self.window:
            refuse(
                f"window {self.window}, shift {self.shift}", "windows of 2..8, shifts of 1..window"
            )
        if not 1 <= self.index_bits <= min(12, self.span) or self.span > MAX_SPAN:
            refuse(
                f"index_bits {self.index_bits} for windows that span {self.span} bits",
                f"1..12 bits, spans of index_bits..{MAX_SPAN}",
            )
        if self.levels not in LEVELS:
            refuse(f"levels {self.levels!r}", " and ".join(LEVELS))
        if self.group is not None and (self.group < 1 or self.group % self.tile_cols):
            refuse(f"group {self.group}", f"multiples of tile_cols {self.tile_cols} and null")

    @property
    def span(self) -> int:
        """Bits of v that mean something."""
        return self.window + self.shift * (self.tile_cols - 1)

    @property
    def tile(self) -> tuple[int, int]:
        return (1, self.tile_cols)

    def num_groups(self, cols: int) -> int:
        """Groups of a row of `cols` columns."""
        return -(-cols // (self.group or cols))

    def layout(self, rows: int, cols: int) -> dict[str, TensorLayout]:
        codes = (rows, packed_bytes(self.grid(rows, cols)[1], self.index_bits))
        group_scale = (rows, packed_bytes(self.num_groups(cols), reference.SCALE_BITS))
        return {
            "codes": TensorLayout(codes, torch.uint8, "codes", by_tile_row=True),
            "code_map": TensorLayout((rows, 2), torch.int32, "side", by_tile_row=True),
            "group_scale": TensorLayout(group_scale, torch.uint8, "side", by_tile_row=True),
            "super_scale": TensorLayout((rows,), torch.float32, "side", by_tile_row=True),
        }

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        return reference.decode(
            tensors,
            self.index_bits,
            self.tile_cols,
            self.window,
            self.shift,
            self.levels,
            self.group,
            rows,
            cols,
        )

    def problem(self, tensors: dict[str, Tensor], rows: int, cols: int) -> str | None:
        a_I, c_I = tensors["code_map"].to(torch.int64).unbind(1)
        largest_I = a_I * ((1 << self.index_bits) - 1) + c_I
        bad = int(((a_I < 0) | (c_I < 0) | (largest_I >= reference.LIMIT)).sum())
        if bad:
            return (
                f"{bad} of the {len(a_I)} rows of code_map (a, c) take codes outside "
                f"0..{reference.LIMIT - 1}"
            )
        return super().problem(tensors, rows, cols)
