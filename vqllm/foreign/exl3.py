"""EXL3, a trellis code of 16 x 16 tiles between two Hadamard transforms, as ExLlamaV3 writes it.

A linear of C inputs and R outputs, K bits a weight, K a whole number or a half more:

    trellis   int16 [C/16, R/16, 16·K]   a tail-biting stream of 256 symbols for each tile, highest
                                         bits first in words of 32 bits, whose halves are stored
                                         the other way round
    suh, svh  float16 [C], [R]           scales with signs; in older files signs alone:
    su, sv    int16 [C/16], [R/16]       a bit a feature, lowest first, 1 for −1
    mcg, mul1 int32 []                   which of three generators makes the values: one of them,
                                         or neither ("3inst"); half bits have mul1

Symbol i ends before bit (i + 1)·K of the stream, rounded down, so that of half bits every other
symbol has one bit more. Its state is the 16 bits that end there, and its value a function of the
state. In the tile it stands at input i0 + 2·i3 + 4·i4 + 8·i1 and output i5 + 2·i6 + 4·i7 + 8·i2,
where i0 to i7 are the bits of i. With the tiles T [C, R] and blocks H of an orthonormal Hadamard
matrix of 128:

    Wᵀ = diag(suh) H T H diag(svh)

That is our format trellis-v3 between transforms, which is how the weights are decoded here too.

Source: arXiv 2406.11235 (QTIP) for the code; the layout is that of exllamav3 1.6.5.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from vqllm.foreign.base import (
    CannotHoldError,
    ForeignFormat,
    Options,
    Packed,
    Rows,
    Shape,
    Stored,
)
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.slices import rows_of
from vqllm_kernels.transforms import HadamardSpec, ScaleSpec, TransformSpec
from vqllm_kernels.trellis.spec import PlacedTrellisSpec

BLOCK = 128
"""Features that are transformed together."""
WORDS = (*range(16, 129, 16), 24, 40, 56)
"""Of a tile, int16: 16 for a bit a weight; half bits are 1.5, 2.5 and 3.5."""
FACTORS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
"""What these generators multiply the state by."""
PLACES = (0, 3, 7, 1, 2, 4, 5, 6)
"""Which bit of its place in a tile, 16 · output + input, each bit of a symbol's number is."""
Side = Literal["in", "out"]
SIDES: dict[Side, tuple[str, str]] = {"in": ("suh", "su"), "out": ("svh", "sv")}
"""The scales and the signs of inputs and of outputs."""
NOTES = (
    "version", "bits", "head_bits", "calibration", "out_scales", "tensor_storage", "codebook",
    "original_bits", "mcg", "mul1", "mcg_multiplier", "mul1_multiplier",
)  # fmt: skip
"""Options that the tensors of each module say themselves."""


@dataclass(frozen=True)
class Exl3(ForeignFormat):
    """Every module says by its own tensors how it is stored."""

    method: ClassVar[str] = "exl3"
    marker: ClassVar[str] = "trellis"
    names: ClassVar[frozenset[str]] = frozenset(
        {"trellis", "suh", "svh", "su", "sv", "mcg", "mul1"}
    )
    codes: ClassVar[frozenset[str]] = frozenset({"trellis"})

    @classmethod
    def from_config(cls, values: Mapping[str, Any], where: str) -> Self:
        options = Options(cls.method, values, where)
        options.ignore(*NOTES)
        options.end()
        return cls()

    def shape(self, module: Stored) -> Shape:
        tile_cols, tile_rows, words = module.shape("trellis", 3)
        rows, cols = 16 * tile_rows, 16 * tile_cols
        if words not in WORDS or rows % BLOCK or cols % BLOCK:
            module.refuse(
                "trellis",
                "[inputs / 16, outputs / 16, 16 · bits] of 1 to 8 bits (whole ones, 1.5, 2.5 or "
                f"3.5), and multiples of {BLOCK} inputs and outputs",
            )
        module.expect("trellis", ("I16",), (tile_cols, tile_rows, words), "its tiles")
        for side, size in self._sizes(Shape(rows, cols)):
            scales, signs = SIDES[side]
            what = f"{size} {side}puts"
            if signs in module.headers and scales not in module.headers:
                module.expect(signs, ("I16",), (size // 16,), what)
            else:
                module.expect(scales, ("F16",), (size,), what)
        generator = self._generator(module)
        if words % 16 and generator != "mul1":
            module.refuse("trellis", f"whole bits with {generator}: only mul1 has half bits")
        return Shape(rows, cols, unit=BLOCK)

    def rows(self, module: Stored, shape: Shape) -> Rows:
        spec, tensors = self._spec(module, shape), self._tensors(module, shape)

        def decode(start: int, stop: int) -> Tensor:
            own, stored = rows_of(spec, tensors, (start, stop))
            return own.dequantize(stored)

        return decode

    def describe(self, module: Stored, shape: Shape) -> str:
        bits = module.headers["trellis"].shape[2] / 16
        return f"trellis {self._generator(module)}, {bits:g} bits"

    def pack(self, module: Stored, shape: Shape) -> Packed:
        for scales, _ in SIDES.values():
            zeros = int((module.read(scales) == 0).sum()) if scales in module.headers else 0
            if zeros:
                raise CannotHoldError(
                    f"{zeros} numbers of {scales} are 0, which a scale of ours is not"
                )
        return self._spec(module, shape), lambda: self._tensors(module, shape)

    def _sizes(self, shape: Shape) -> tuple[tuple[Side, int], ...]:
        """The features of both sides."""
        return ("in", shape.cols), ("out", shape.rows)

    def _spec(self, module: Stored, shape: Shape) -> LinearSpec:
        format = PlacedTrellisSpec(
            tile_rows=16,
            code=self._generator(module),
            tile_bits=16 * module.headers["trellis"].shape[2],
            state_bits=16,
            places=PLACES,
        )
        transforms: list[TransformSpec] = []
        for side, size in self._sizes(shape):
            if SIDES[side][0] in module.headers:
                transforms.append(ScaleSpec(side=side, size=size))
            transforms.append(HadamardSpec(side=side, size=size, block=BLOCK))
        return LinearSpec(
            rows=shape.rows, cols=shape.cols, format=format, transforms=tuple(transforms)
        )

    def _tensors(self, module: Stored, shape: Shape) -> dict[str, Tensor]:
        """Those of `_spec`."""
        halves_JIW = module.read("trellis").unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        parts: list[dict[str, Tensor]] = []
        for side, size in self._sizes(shape):
            scales, signs = SIDES[side]
            if scales in module.headers:
                parts.append({"scale": module.read(scales)})
                parts.append({"signs": torch.zeros(size // 8, dtype=torch.uint8)})
            else:
                parts.append({"signs": module.read(signs).view(torch.uint8)})
        named = {f"t{i}_{key}": value for i, own in enumerate(parts) for key, value in own.items()}
        codes = halves_JIW.transpose(0, 1).contiguous()
        return {"codes": codes, "scale": torch.ones(1), **named}

    def _generator(self, module: Stored) -> str:
        named = [name for name in FACTORS if name in module.headers]
        if not named:
            return "3inst"
        factor = int(module.read(named[0]).flatten()[0]) & 0xFFFFFFFF
        if len(named) > 1 or factor != FACTORS[named[0]]:
            raise module.wrong(
                f"its {' and '.join(named)} is {factor:#x}; known are a factor of "
                f"{FACTORS['mcg']:#x} of mcg or {FACTORS['mul1']:#x} of mul1"
            )
        return named[0]
