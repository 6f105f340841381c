"""Format pyramid-v1: any rate up to 128 bits a tile; the bits are in `reference`."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqllm_kernels.bitpack import count_beyond, packed_bytes
from vqllm_kernels.formats import FormatSpec, register
from vqllm_kernels.layout import TensorLayout
from vqllm_kernels.pyramid import reference

MAX_DIM = 128
MAX_LEVELS = 256
MAX_TILE_BITS = 128


@register
@dataclass(frozen=True, kw_only=True)
class PyramidSpec(FormatSpec):
    """`dim` weights of a row: a direction with `pulses` pulses, times one of `levels` lengths."""

    format_id: ClassVar[str] = "pyramid-v1"

    dim: int
    pulses: int
    levels: int

    def __post_init__(self) -> None:
        if not 2 <= self.dim <= MAX_DIM or not 1 <= self.levels <= MAX_LEVELS or self.pulses < 1:
            raise ValueError(
                f"{self.format_id}: {self.dim} weights, {self.pulses} pulses, {self.levels} "
                f"levels; allowed are 2..{MAX_DIM} weights, at least one pulse and "
                f"1..{MAX_LEVELS} levels"
            )
        most = reference.most_pulses(self.dim, self.levels, MAX_TILE_BITS)
        if self.pulses > most:
            raise ValueError(
                f"{self.format_id}: {self.pulses} pulses; {self.dim} weights with {self.levels} "
                f"levels have 1..{most} in the {MAX_TILE_BITS} bits that a tile may take"
            )

    @property
    def tile(self) -> tuple[int, int]:
        return (1, self.dim)

    @property
    def tile_bits(self) -> int:
        """Bits of the code of a tile."""
        return reference.tile_bits(self.dim, self.pulses, self.levels)

    def layout(self, rows: int, cols: int) -> dict[str, TensorLayout]:
        num_tile_rows, num_tile_cols = self.grid(rows, cols)
        codes = (num_tile_rows, packed_bytes(num_tile_cols, self.tile_bits))
        return {
            "codes": TensorLayout(codes, torch.uint8, "codes", by_tile_row=True),
            "levels": TensorLayout((self.levels,), torch.float32, "codebook"),
        }

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        return reference.decode(tensors, self.dim, self.pulses, rows, cols)

    def problem(self, tensors: dict[str, Tensor], rows: int, cols: int) -> str | None:
        num_codes = reference.num_directions(self.dim, self.pulses) * self.levels
        _, num_tile_cols = self.grid(rows, cols)
        if bad := count_beyond(tensors["codes"], self.tile_bits, num_tile_cols, num_codes):
            return f"{bad} codes are not below {num_codes}, the number of codewords"
        return super().problem(tensors, rows, cols)
