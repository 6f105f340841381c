"""Format uniform-v1: 1 to 8 bits a weight; the bits are in `reference`."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqllm_kernels.bitpack import packed_bytes
from vqllm_kernels.formats import FormatSpec, register
from vqllm_kernels.layout import TensorLayout
from vqllm_kernels.uniform import reference


@register
@dataclass(frozen=True, kw_only=True)
class UniformSpec(FormatSpec):
    """Integers of `bits` bits; `group` columns of a row share a scale (None: the whole row)."""

    format_id: ClassVar[str] = "uniform-v1"

    bits: int
    group: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or (self.group is not None and self.group < 1):
            raise ValueError(
                f"{self.format_id}: {self.bits} bits in groups of {self.group}; allowed are "
                "1..8 bits and groups of at least one column, or None"
            )

    @property
    def tile(self) -> tuple[int, int]:
        return (1, 1)

    def num_groups(self, cols: int) -> int:
        """Groups of a row of `cols` columns."""
        return -(-cols // (self.group or cols))

    def layout(self, rows: int, cols: int) -> dict[str, TensorLayout]:
        groups = (rows, self.num_groups(cols))
        codes = (rows, packed_bytes(cols, self.bits))
        return {
            "codes": TensorLayout(codes, torch.uint8, "codes", by_tile_row=True),
            "scale": TensorLayout(groups, torch.float16, "side", by_tile_row=True),
            "zero": TensorLayout(groups, torch.uint8, "side", by_tile_row=True),
        }

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        return reference.decode(tensors, self.bits, self.group, rows, cols)

    def problem(self, tensors: dict[str, Tensor], rows: int, cols: int) -> str | None:
        largest = int(tensors["zero"].max())
        if largest >= 1 << self.bits:
            return f"a zero point is {largest}; allowed are 0..{(1 << self.bits) - 1}"
        return super().problem(tensors, rows, cols)
