"""Format leech-v1: 1 to 3 bits a weight; the bits are in `reference`."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqllm_kernels.bitpack import count_beyond, packed_bytes
from vqllm_kernels.formats import FormatSpec, register
from vqllm_kernels.layout import TensorLayout
from vqllm_kernels.leech import reference


@register
@dataclass(frozen=True, kw_only=True)
class LeechSpec(FormatSpec):
    """24 weights of a row in `index_bits`: a point of one of the `shells` times the shell's gain.

    A shell may occur more than once, with another gain each time.
    """

    format_id: ClassVar[str] = "leech-v1"

    index_bits: int
    shells: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.index_bits % reference.SYMBOL_BITS or not 24 <= self.index_bits <= 72:
            raise ValueError(
                f"{self.format_id}: {self.index_bits} bits a tile; allowed are the multiples of "
                f"{reference.SYMBOL_BITS} from 24 to 72"
            )
        bad = [shell for shell in self.shells if not 2 <= shell <= reference.MAX_SHELL]
        if bad or not self.shells:
            raise ValueError(
                f"{self.format_id}: shells {list(self.shells)}; needed are one or more of 2.."
                f"{reference.MAX_SHELL}"
            )
        if reference.origin(self.shells) >> self.index_bits:
            raise ValueError(
                f"{self.format_id}: shells {list(self.shells)} have "
                f"{sum(map(reference.shell_size, self.shells))} points, too many for "
                f"{self.index_bits} bits"
            )

    @property
    def tile(self) -> tuple[int, int]:
        return (1, reference.DIMENSIONS)

    def layout(self, rows: int, cols: int) -> dict[str, TensorLayout]:
        num_tile_rows, num_tile_cols = self.grid(rows, cols)
        codes = (num_tile_rows, packed_bytes(num_tile_cols, self.index_bits))
        return {
            "codes": TensorLayout(codes, torch.uint8, "codes", by_tile_row=True),
            "gains": TensorLayout((len(self.shells),), torch.float32, "side"),
        }

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        return reference.decode(tensors, self.index_bits, self.shells, rows, cols)

    def problem(self, tensors: dict[str, Tensor], rows: int, cols: int) -> str | None:
        last = reference.origin(self.shells)
        _, num_tile_cols = self.grid(rows, cols)
        if bad := count_beyond(tensors["codes"], self.index_bits, num_tile_cols, last + 1):
            return f"{bad} codes are above {last}, the last that stands for a point"
        return super().problem(tensors, rows, cols)
