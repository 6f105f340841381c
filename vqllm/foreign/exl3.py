"""EXL3, a trellis code of 16 x 16 tiles between two Hadamard transforms, as ExLlamaV3 writes it.

A linear of C inputs and R outputs, K bits a weight:

    trellis   int16 [C/16, R/16, 16·K]   a tail-biting stream of 256 symbols of K bits for each
                                         tile, highest bits first in words of 32 bits, whose halves
                                         are stored the other way round
    suh, svh  float16 [C], [R]           scales with signs (signs alone, `su` and `sv` of older
                                         files, are not read)
    mcg, mul1 int32 []                   which of three generators makes the values: one of them,
                                         or neither ("3inst")

The state of symbol i is the 16 bits that end with it, and its value a function of the state. In the
tile it stands at input i0 + 2·i3 + 4·i4 + 8·i1 and output i5 + 2·i6 + 4·i7 + 8·i2, where i0 to i7
are the bits of i. With the tiles T [C, R] and blocks H of an orthonormal Hadamard matrix of 128:

    Wᵀ = diag(suh) H T H diag(svh)

Source: arXiv 2406.11235 (QTIP) for the code; the layout is that of exllamav3 1.6.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from vqllm.foreign.base import ForeignFormat, Options, Rows, Shape, Stored

BLOCK = 128
"""Features that are transformed together."""
BITS = range(1, 9)
GENERATORS = {"3inst": (89226354, 64248484), "mcg": (0xCBAC1FED, 0), "mul1": (0x83DCD12D, 0)}
"""Factor and summand of the linear congruence that makes 32 bits of a state."""
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
    names: ClassVar[frozenset[str]] = frozenset({"trellis", "suh", "svh", "mcg", "mul1"})
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
        if words % 16 or words // 16 not in BITS or rows % BLOCK or cols % BLOCK:
            module.refuse(
                "trellis",
                "[inputs / 16, outputs / 16, 16 · bits] of 1..8 whole bits, and multiples of "
                f"{BLOCK} inputs and outputs",
            )
        module.expect("trellis", ("I16",), (tile_cols, tile_rows, words), "its tiles")
        module.expect("suh", ("F16",), (cols,), f"{cols} inputs (su, of older files, is not read)")
        module.expect("svh", ("F16",), (rows,), f"{rows} outputs (sv, of older files, is not read)")
        self._generator(module)
        return Shape(rows, cols, unit=BLOCK)

    def rows(self, module: Stored, shape: Shape) -> Rows:
        trellis, bits = module.read("trellis"), self._bits(module)
        value_S = _values(self._generator(module))
        suh_C, svh_R = module.read("suh").float(), module.read("svh").float()
        hadamard, place = _hadamard(), _places()

        def decode(start: int, stop: int) -> Tensor:
            tiles = value_S[_states(trellis[:, start // 16 : stop // 16], bits)]
            tiles = tiles[..., place].unflatten(-1, (16, 16))
            inner_CR = tiles.transpose(1, 2).reshape(shape.cols, stop - start)
            left = (hadamard @ inner_CR.view(-1, BLOCK, stop - start)).view_as(inner_CR)
            left *= suh_C[:, None]
            right = (left.view(shape.cols, -1, BLOCK) @ hadamard).view_as(left)
            return (right * svh_R[start:stop]).T

        return decode

    def describe(self, module: Stored, shape: Shape) -> str:
        return f"trellis {self._generator(module)}, {self._bits(module)} bits"

    def _bits(self, module: Stored) -> int:
        return module.headers["trellis"].shape[2] // 16

    def _generator(self, module: Stored) -> str:
        named = [name for name in ("mcg", "mul1") if name in module.headers]
        if not named:
            return "3inst"
        factor = int(module.read(named[0]).flatten()[0]) & 0xFFFFFFFF
        if len(named) > 1 or factor != GENERATORS[named[0]][0]:
            raise module.wrong(
                f"its {' and '.join(named)} is {factor:#x}; known are a factor of "
                f"{GENERATORS['mcg'][0]:#x} of mcg or {GENERATORS['mul1'][0]:#x} of mul1"
            )
        return named[0]


def _states(trellis: Tensor, bits: int) -> Tensor:
    """The 16 bits that end with each of the 256 symbols, int64 [.., 256] from int16 [.., 16·K]."""
    halves = (trellis.int() & 0xFFFF).unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    # A state is 16 bits of the circular stream, so at most two halves have it.
    first = (torch.arange(1, 257) * bits - 16) % (256 * bits)
    half, offset = first // 16, first % 16
    pairs = (halves[..., half] << 16) | halves[..., (half + 1) % (16 * bits)]
    return ((pairs >> (16 - offset)) & 0xFFFF).long()


def _values(generator: str) -> Tensor:
    """The value of each state, float32 [65536]."""
    factor, summand = GENERATORS[generator]
    bits_S = (torch.arange(1 << 16) * factor + summand) & 0xFFFFFFFF
    if generator == "mul1":
        total = torch.stack([(bits_S >> shift) & 0xFF for shift in (0, 8, 16, 24)]).sum(0)
        # The sum of four bytes is the low part of a float16 of 1024 and more; scaled and centred by
        # float16 constants.
        number = _float16(total + 0x6400)
        scale, centre = _float16(torch.tensor([0x1EEE, 0xC931]))
        return number * scale + centre
    # Sign, the lowest bits of the exponent and the mantissa of two float16, around 0x3B60.
    masked = (bits_S & 0x8FFF8FFF) ^ 0x3B603B60
    return _float16(masked & 0xFFFF) + _float16(masked >> 16)


def _float16(patterns: Tensor) -> Tensor:
    """Numbers from their bits in float16."""
    signed = torch.where(patterns >= 1 << 15, patterns - (1 << 16), patterns)
    return signed.to(torch.int16).view(torch.float16).float()


def _places() -> Tensor:
    """For each place of a tile, inputs by outputs, the symbol that stands there, int64 [256]."""
    i = torch.arange(256)
    bit = [(i >> k) & 1 for k in range(8)]
    col = bit[0] + 2 * bit[3] + 4 * bit[4] + 8 * bit[1]
    row = bit[5] + 2 * bit[6] + 4 * bit[7] + 8 * bit[2]
    return torch.argsort(16 * col + row)


def _hadamard() -> Tensor:
    """The orthonormal Hadamard matrix of 128 in Sylvester's order."""
    matrix = torch.ones(1, 1)
    while len(matrix) < BLOCK:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(BLOCK)
