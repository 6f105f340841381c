"""Format learned-lattice-v1: 1 to 8 bits a component; the bits are in `reference`."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqllm_kernels.bitpack import packed_bytes
from vqllm_kernels.formats import FormatSpec, register
from vqllm_kernels.layout import TensorLayout
from vqllm_kernels.learned_lattice import reference

MAX_DIM = 32


@register
@dataclass(frozen=True, kw_only=True)
class LearnedLatticeSpec(FormatSpec):
    """Tiles of `len(widths)` weights of a row, a symbol of `widths[i]` bits for each component.

    `group` columns share a generator, a scale and a mu (None: all columns do).
    """

    format_id: ClassVar[str] = "learned-lattice-v1"

    widths: tuple[int, ...]
    group: int | None
    lattice: str
    companding: str
    generator: str

    def __post_init__(self) -> None:
        dim = len(self.widths)
        if not 1 <= dim <= MAX_DIM or not all(1 <= width <= 8 for width in self.widths):
            raise ValueError(
                f"{self.format_id}: widths {self.widths}; allowed are 1..{MAX_DIM} components of "
                "1..8 bits"
            )
        for value, allowed in (
            (self.lattice, reference.LATTICES),
            (self.companding, reference.COMPANDINGS),
            (self.generator, reference.GENERATORS),
        ):
            if value not in allowed:
                raise ValueError(f"{self.format_id}: {value!r}; allowed are {', '.join(allowed)}")
        if self.lattice == "e8" and dim % 8:
            raise ValueError(
                f"{self.format_id}: e8 with {dim} components; needed is a multiple of 8"
            )
        if self.group is not None and (self.group < 1 or self.group % dim):
            raise ValueError(
                f"{self.format_id}: groups of {self.group} columns; needed is a multiple of the "
                f"{dim} components, or None"
            )

    @property
    def tile(self) -> tuple[int, int]:
        return (1, len(self.widths))

    def groups(self, first: int, num_tiles: int, device: torch.device) -> Tensor:
        """The group of each of `num_tiles` columns of tiles from the column `first` on, [J]."""
        column_J = torch.arange(first, first + num_tiles, device=device)
        if self.group is None:
            return torch.zeros_like(column_J)
        return column_J // (self.group // len(self.widths))

    def layout(self, rows: int, cols: int) -> dict[str, TensorLayout]:
        dim = len(self.widths)
        num_tile_rows, num_tile_cols = self.grid(rows, cols)
        num_groups = 1 if self.group is None else -(-cols // self.group)
        codes = (num_tile_rows, packed_bytes(num_tile_cols, sum(self.widths)))
        entries = dim if self.generator == "diagonal" else dim * (dim + 1) // 2
        layout = {
            "codes": TensorLayout(codes, torch.uint8, "codes", by_tile_row=True),
            "generator": TensorLayout((num_groups, entries), torch.float16, "codebook"),
            "scale": TensorLayout((num_groups,), torch.float32, "side"),
        }
        if self.companding != "none":
            layout["mu"] = TensorLayout((num_groups,), torch.float32, "side")
        return layout

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        _, num_tile_cols = self.grid(rows, cols)
        codes_IJM = reference.unpack_symbols(tensors["codes"], self.widths, num_tile_cols)
        return self.reproduce(codes_IJM, tensors).flatten(1)[:rows, :cols]

    def reproduce(self, codes_IJM: Tensor, tensors: dict[str, Tensor], first: int = 0) -> Tensor:
        """Weights of symbols, float32 [I, J, d], from the column of tiles `first` on."""
        return reference.reproduce(
            codes_IJM,
            tensors,
            self.groups(first, codes_IJM.shape[1], codes_IJM.device),
            self.lattice,
            self.companding,
            self.widths,
        )
