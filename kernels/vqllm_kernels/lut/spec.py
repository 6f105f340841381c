"""Formats lut-v1 and lut-v2: 1 to 16 bits a tile, indices into tables.

lut-v1 has one table of float16 (the bits are in `reference`), lut-v2 one for every group of rows
and columns, in one of three forms, and scales (`reference_v2`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vqllm_kernels.bitpack import MAX_WIDTH, packed_bytes, unpack_bits
from vqllm_kernels.cpu.kernels import PackedKernels
from vqllm_kernels.formats import FormatSpec, register
from vqllm_kernels.kernels import Kernels, Kind
from vqllm_kernels.layout import TensorLayout
from vqllm_kernels.lut import reference, reference_v2
from vqllm_kernels.tables import equal_entries

if TYPE_CHECKING:
    from vqllm_kernels.cpu.parts import Part

MAX_PACKED = (16, 8)
"""Columns and bits of an index up to which it is multiplied as it is stored."""
FEWEST_WITHOUT_AVX512 = 2
"""Columns of an entry from which on AVX2 is faster than decoded weights: 4096 x 4096 takes 6.0 ms
with 1, 3.2 with 2, 2.1 with 3, 1.5 with 4 and 1.0 with 8, torch's product 4.3 with AVX2."""
CODEBOOKS = ("float16", "int8", "svd")
"""Forms in which the codebooks of lut-v2 are stored."""


@register
@dataclass(frozen=True, kw_only=True)
class LutSpec(FormatSpec):
    """Tiles of `tile_rows` x `tile_cols` weights, `index_bits` a tile, one table a linear."""

    format_id: ClassVar[str] = "lut-v1"

    tile_rows: int
    tile_cols: int
    index_bits: int

    def __post_init__(self) -> None:
        _check_tile(self)

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

    def kernels(self, kind: Kind) -> Kernels:
        if kind == "triton":
            from vqllm_kernels.lut.kernels import LutKernels

            return LutKernels(self)
        if kind == "packed":
            return PackedKernels(
                spec=self,
                parts=self._parts,
                reason=self._not_packed(),
                wide_only=self.tile_cols < FEWEST_WITHOUT_AVX512,
            )
        if kind == "lookup":
            from vqllm_kernels.lut.cpu import LookupKernels

            return LookupKernels(spec=self, index_bits=self.index_bits, entries=_codebook)
        return super().kernels(kind)

    def _not_packed(self) -> str | None:
        most_cols, most_bits = MAX_PACKED
        if self.tile_rows > 1 or self.tile_cols > most_cols or self.index_bits > most_bits:
            return (
                f"entries of {self.tile_rows} x {self.tile_cols}, {self.index_bits} bits; packed "
                f"products take one row, at most {most_cols} columns and {most_bits} bits"
            )
        return None

    def _parts(self, tensors: dict[str, Tensor]) -> "list[Part]":
        from vqllm_kernels.cpu import codebooks, instructions

        codes = tensors["codes"]
        if self.index_bits < 8:
            # Zero bits at the end of a row may be some more indices, which x has nothing for.
            most = 8 * codes.shape[1] // self.index_bits
            codes = unpack_bits(codes, self.index_bits, most).to(torch.uint8)
        entries_ED, unit = codebooks.rounded(_codebook(tensors))
        return [codebooks.part(codes, entries_ED, unit, instructions.instructions())]

    def problem(self, tensors: dict[str, Tensor], rows: int, cols: int) -> str | None:
        problem = super().problem(tensors, rows, cols)
        return problem or equal_entries("codebook", tensors["codebook"])


@register
@dataclass(frozen=True, kw_only=True)
class GroupedLutSpec(FormatSpec):
    """A codebook for each group of `group_rows` x `group_cols` weights; None is all of them.

    `codebook` is the form in which codebooks are stored, `rank` belongs to "svd" only. Where
    `scale_cols` is not None, every row of tiles has a scale for so many columns of W.
    """

    format_id: ClassVar[str] = "lut-v2"

    tile_rows: int
    tile_cols: int
    index_bits: int
    group_rows: int | None = None
    group_cols: int | None = None
    codebook: str = "float16"
    rank: int | None = None
    scale_cols: int | None = None

    def __post_init__(self) -> None:
        _check_tile(self)
        for name, size, unit in (
            ("group_rows", self.group_rows, self.tile_rows),
            ("group_cols", self.group_cols, self.tile_cols),
            ("scale_cols", self.scale_cols, self.tile_cols),
        ):
            if size is not None and (size < 1 or size % unit):
                raise ValueError(
                    f"{self.format_id}: {name} is {size}; allowed are multiples of {unit}, the "
                    "size of a tile, and None"
                )
        if self.codebook not in CODEBOOKS:
            raise ValueError(
                f"{self.format_id}: codebook {self.codebook!r}; allowed are {', '.join(CODEBOOKS)}"
            )
        if self.codebook == "svd":
            if self.rank is None or self.rank < 1 or self.tile != (1, 1):
                raise ValueError(
                    f"{self.format_id}: codebook svd of rank {self.rank} with tiles {self.tile}; "
                    "needed are a rank of at least 1 and tiles (1, 1)"
                )
        elif self.rank is not None:
            raise ValueError(
                f"{self.format_id}: rank {self.rank} with codebook {self.codebook}; allowed is None"
            )

    @property
    def tile(self) -> tuple[int, int]:
        return (self.tile_rows, self.tile_cols)

    def num_groups(self, rows: int, cols: int) -> tuple[int, int]:
        """Rows and columns of groups."""
        return -(-rows // (self.group_rows or rows)), -(-cols // (self.group_cols or cols))

    def layout(self, rows: int, cols: int) -> dict[str, TensorLayout]:
        num_tile_rows, num_tile_cols = self.grid(rows, cols)
        codes = (num_tile_rows, packed_bytes(num_tile_cols, self.index_bits))
        layout = {"codes": TensorLayout(codes, torch.uint8, "codes", by_tile_row=True)}
        layout |= self._codebook_layout(*self.num_groups(rows, cols))
        if self.scale_cols is not None:
            num_blocks = -(-cols // self.scale_cols)
            index = (num_tile_rows, packed_bytes(num_blocks, reference_v2.SCALE_BITS))
            table = (num_blocks, 1 << reference_v2.SCALE_BITS)
            layout["scale_index"] = TensorLayout(index, torch.uint8, "side", by_tile_row=True)
            layout["scale_table"] = TensorLayout(table, torch.bfloat16, "side")
        return layout

    def _codebook_layout(self, *groups: int) -> dict[str, TensorLayout]:
        num_entries, num_elements = 1 << self.index_bits, self.tile_rows * self.tile_cols
        entries = (*groups, num_entries, num_elements)
        if self.codebook == "float16":
            return {"codebook": TensorLayout(entries, torch.float16, "codebook")}
        if self.codebook == "int8":
            return {
                "codebook": TensorLayout(entries, torch.int8, "codebook"),
                "codebook_scale": TensorLayout(groups, torch.bfloat16, "codebook"),
            }
        assert self.rank is not None
        return {
            "coefficients": TensorLayout((*groups, self.rank), torch.int8, "codebook"),
            "basis": TensorLayout((self.rank, num_entries), torch.float32, "codebook"),
        }

    def problem(self, tensors: dict[str, Tensor], rows: int, cols: int) -> str | None:
        problem = super().problem(tensors, rows, cols)
        if self.codebook != "float16":  # integers and products cannot be told to differ
            return problem
        return problem or equal_entries("codebook", tensors["codebook"])

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        num_tile_rows, _ = self.grid(rows, cols)
        tile_row_I = torch.arange(num_tile_rows, device=tensors["codes"].device)
        return self._decode_tile_rows(tensors, tile_row_I, cols)[:rows]

    def _decode_tile_rows(
        self, tensors: dict[str, Tensor], tile_row_N: Tensor, cols: int
    ) -> Tensor:
        if self.group_rows is None:
            group_I = torch.zeros_like(tile_row_N)
        else:
            group_I = tile_row_N // (self.group_rows // self.tile_rows)
        return reference_v2.decode(
            tensors,
            self.tile,
            self.index_bits,
            self.group_cols and self.group_cols // self.tile_cols,
            self.scale_cols and self.scale_cols // self.tile_cols,
            group_I,
            cols,
        )


def _codebook(tensors: dict[str, Tensor]) -> Tensor:
    return tensors["codebook"].float()


def _check_tile(spec: LutSpec | GroupedLutSpec) -> None:
    if spec.tile_rows < 1 or spec.tile_cols < 1 or not 1 <= spec.index_bits <= MAX_WIDTH:
        raise ValueError(
            f"{spec.format_id}: tile {spec.tile} of {spec.index_bits} bits; a tile has at "
            f"least one row and column and 1..{MAX_WIDTH} bits"
        )
