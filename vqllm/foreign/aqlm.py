"""AQLM: every tile of weights is a sum of entries of codebooks, times a scale of its outputs.

A linear of R x C weights, tiles of o x i, n codebooks of 2^b entries:

    codes      int8 or int16 [R/o, C/i, n]   indices, modulo 2^b (they are stored with a sign)
    codebooks  float [n, 2^b, o, i]
    scales     float [R/o, 1, 1, 1]

Source: arXiv 2401.06118; the layout is that of the `aqlm` package's QuantizedLinear.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from vqllm.foreign.base import (
    FLOATS,
    ForeignFormat,
    Options,
    Packed,
    Rows,
    Shape,
    Stored,
    exact_half,
)
from vqllm_kernels.bitpack import pack_bits
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.lut.spec import LutSpec
from vqllm_kernels.residual.spec import ResidualSpec
from vqllm_kernels.transforms import ScaleSpec

MANY = range(1, 1 << 16)


@dataclass(frozen=True)
class Aqlm(ForeignFormat):
    """Tiles of `tile_rows` x `tile_cols`, `num_codebooks` of 2^`index_bits` entries."""

    method: ClassVar[str] = "aqlm"
    marker: ClassVar[str] = "codes"
    names: ClassVar[frozenset[str]] = frozenset({"codes", "codebooks", "scales"})
    codes: ClassVar[frozenset[str]] = frozenset({"codes"})
    tables: ClassVar[frozenset[str]] = frozenset({"codebooks"})

    tile_rows: int
    tile_cols: int
    num_codebooks: int
    index_bits: int

    @classmethod
    def from_config(cls, values: Mapping[str, Any], where: str) -> Self:
        options = Options(cls.method, values, where)
        made = cls(
            tile_rows=options.number("out_group_size", MANY, 1),
            tile_cols=options.number("in_group_size", MANY, 8),
            num_codebooks=options.number("num_codebooks", MANY, 1),
            index_bits=options.number("nbits_per_codebook", range(1, 17), 16),
        )
        options.ignore("linear_weights_not_to_quantize")
        options.end()
        return made

    def shape(self, module: Stored) -> Shape:
        num_rows, num_cols, _ = module.shape("codes", 3)
        what = f"{self.num_codebooks} codebooks of {self.index_bits} bits"
        integers = ("I8",) if self.index_bits <= 8 else ("I16",)
        module.expect("codes", integers, (num_rows, num_cols, self.num_codebooks), what)
        entries = (self.num_codebooks, 1 << self.index_bits, self.tile_rows, self.tile_cols)
        module.expect("codebooks", FLOATS, entries, f"tiles of {self.tile_rows}x{self.tile_cols}")
        module.expect("scales", FLOATS, (num_rows, 1, 1, 1), f"{num_rows} rows of tiles")
        return Shape(num_rows * self.tile_rows, num_cols * self.tile_cols, self.tile_rows)

    def rows(self, module: Stored, shape: Shape) -> Rows:
        codes, scales = module.read("codes"), module.read("scales").float()[:, :, 0]
        codebooks = module.read("codebooks").float()

        def decode(start: int, stop: int) -> Tensor:
            first, last = start // self.tile_rows, stop // self.tile_rows
            index_IJM = self._unsigned(codes[first:last])
            tiles = codebooks[0][index_IJM[..., 0]]
            for m in range(1, self.num_codebooks):
                tiles += codebooks[m][index_IJM[..., m]]
            tiles *= scales[first:last, :, None]
            return tiles.transpose(1, 2).reshape(stop - start, shape.cols)

        return decode

    def describe(self, module: Stored, shape: Shape) -> str:
        return (
            f"{self.num_codebooks} x {self.index_bits} bits for {self.tile_rows} x {self.tile_cols}"
        )

    def pack(self, module: Stored, shape: Shape) -> Packed:
        lut = LutSpec(
            tile_rows=self.tile_rows, tile_cols=self.tile_cols, index_bits=self.index_bits
        )
        several = self.num_codebooks > 1
        format = ResidualSpec(stages=(lut,) * self.num_codebooks) if several else lut
        codebooks = exact_half("codebooks", module.read("codebooks"))
        scale_R = exact_half("scales", module.read("scales")).flatten()

        def make() -> dict[str, Tensor]:
            codes_IJM = module.read("codes")
            tensors = {"t0_scale": scale_R.repeat_interleave(self.tile_rows)}
            for m in range(self.num_codebooks):
                prefix = f"s{m}_" if several else ""
                index_IJ = self._unsigned(codes_IJM[..., m])
                tensors[f"{prefix}codes"] = pack_bits(index_IJ, self.index_bits)
                tensors[f"{prefix}codebook"] = codebooks[m].flatten(1).contiguous()
            return tensors

        scale = ScaleSpec(side="out", size=shape.rows)
        spec = LinearSpec(rows=shape.rows, cols=shape.cols, format=format, transforms=(scale,))
        return spec, make

    def _unsigned(self, codes: Tensor) -> Tensor:
        return codes.int() & ((1 << self.index_bits) - 1)
