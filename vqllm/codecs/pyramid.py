"""Pyramid vector quantization: a tile of a row is one of N directions times one of G lengths.

The directions are those of all integer vectors y with Σ|y_i| = K, numbered without a table
(`vqllm_kernels.pyramid.reference`); K and G give almost any rate. Made for weights that a random
rotation has made Gaussian: the lengths are those for the norm of Gaussian tiles.

The code is exact: for any length the nearest direction is that of the least angle
(`pyramid_nearest`), and for that direction the nearest length is the one next to x·y/‖y‖. Greedy
placing of pulses has 0.4 % more distortion at 2 bits, 1 to 2 % more at 3, 2 to 3 % more at 4. With
errors weighted by a matrix the search is a local one (`pyramid_weighted`).

G need not be a power of two: number and length share one integer, so the part of a bit that the
number does not need gives more lengths. Distortion of Gaussian weights, and with a power of two:

    weights a tile    2 bits             3 bits             4 bits
    8                 0.1066             0.0274  0.0281     0.00677  0.00700
    16                0.1001  0.1050     0.0250  0.0267     0.00628  0.00644
    32                0.0996  0.1004     0.0245  0.0247     0.00612  0.00614
    64                0.0978

Larger tiles are better, with weighted errors even more so, but slower to decode: in LDLQ with the
layers of a small model, 2 bits, the proxy losses of 16, 32 and 64 weights are 1, 0.975 and 0.945.

Source: PVQ, arXiv 2410.16926; Fischer, "A pyramid vector quantizer", IEEE Trans. Inform. Theory 32
(1986), 568-583.
"""

from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from vqllm.codecs import pyramid_design
from vqllm.codecs.base import CODECS, ScaledCodec, check_finite, nearest_entry
from vqllm.codecs.search import pyramid as pyramid_nearest
from vqllm.codecs.search import pyramid_weighted
from vqllm.core.protocols import Point, State
from vqllm.errors import RecipeError
from vqllm_kernels.bitpack import pack_wide, unpack_wide
from vqllm_kernels.pyramid import reference
from vqllm_kernels.pyramid.spec import MAX_DIM, MAX_LEVELS, MAX_TILE_BITS, PyramidSpec

_DEFAULT_RATE = 2.0
_GREEDY = "measured, with greedily placed pulses"


def _point(mse: float, source: str, *, quick: bool = False, **options: float) -> Point:
    label = ", ".join(f"{name} {value:g}" for name, value in options.items())
    return Point(
        label=label,
        options=dict(options),
        mse=mse,
        source=source,
        num_weights=1 << 18,
        quick=quick,
    )


@CODECS.register("pyramid")
class Pyramid(ScaledCodec):
    """Directions with a given number of pulses, and lengths common to the matrix."""

    weighted: ClassVar[bool] = True
    gaussian_scale: ClassVar[float] = 1.0

    points: ClassVar[tuple[Point, ...]] = (
        _point(0.1112, _GREEDY, dim=16, pulses=10, levels=8),
        _point(0.0271, _GREEDY, dim=16, pulses=23, levels=8),
        _point(0.0066, _GREEDY, dim=16, pulses=48, levels=16),
        _point(0.1004, _GREEDY, dim=32, pulses=21, levels=4),
        _point(0.0250, _GREEDY, dim=32, pulses=48, levels=4),
        _point(0.0062, _GREEDY, dim=32, pulses=96, levels=16),
        _point(0.1001, "measured", dim=16, bits=2, quick=True),
        _point(0.0736, "measured", dim=16, bits=2.25),
        _point(0.0250, "measured", dim=16, bits=3),
        _point(0.0063, "measured", dim=16, bits=4),
        _point(0.0996, "measured", dim=32, bits=2),
        _point(0.0245, "measured", dim=32, bits=3),
        _point(0.0061, "measured", dim=32, bits=4),
        _point(0.0978, "measured", dim=64, bits=2),
    )

    # `bits` in a recipe; as an attribute that name is the method that counts the stored bits.
    model_config = ConfigDict(serialize_by_alias=True)

    type: Literal["pyramid"] = "pyramid"
    dim: int = Field(16, ge=2, le=MAX_DIM, description="weights of a tile, along a row")
    rate: float | None = Field(
        None,
        alias="bits",
        gt=0,
        le=16,
        description="bits a weight, at most: pulses and levels are the best that fit; null is "
        f"{_DEFAULT_RATE:g}, or whatever `pulses` and `levels` take",
    )
    pulses: int | None = Field(
        None,
        ge=1,
        le=reference.MAX_PULSES,
        description="K: the sum of the absolute values of a direction; null is by `bits`",
    )
    levels: int | None = Field(
        None,
        ge=1,
        le=MAX_LEVELS,
        description="lengths; a power of two is whole bits of gain; null is by `bits`",
    )

    @model_validator(mode="after")
    def _has_a_format(self) -> "Pyramid":
        if (self.pulses is None) != (self.levels is None):
            given, other = ("pulses", "levels") if self.levels is None else ("levels", "pulses")
            raise RecipeError(
                f"codec pyramid: {given} {getattr(self, given)} without {other}; give both, or "
                "`bits` alone"
            )
        if self.rate is not None and self.pulses is not None:
            raise RecipeError(
                f"codec pyramid: bits {self.rate:g} and pulses {self.pulses}; give `bits`, or "
                "`pulses` and `levels`"
            )
        try:
            self.spec()
        except ValueError as error:
            raise RecipeError(f"codec pyramid: {error}") from error
        return self

    @property
    def tile(self) -> tuple[int, int]:
        return (1, self.dim)

    @property
    def num_symbols(self) -> int:
        return -(-self.spec().tile_bits // reference.SYMBOL_BITS)

    def spec(self) -> PyramidSpec:
        if self.pulses is not None and self.levels is not None:
            return PyramidSpec(dim=self.dim, pulses=self.pulses, levels=self.levels)
        rate = _DEFAULT_RATE if self.rate is None else self.rate
        # A millionth of a bit more, for rates like 2.1 whose binary fraction is a little too small.
        bits = int(rate * self.dim + 1e-6)
        least = reference.tile_bits(self.dim, 1, 1)
        if not least <= bits <= MAX_TILE_BITS:
            raise RecipeError(
                f"codec pyramid: bits {rate:g}, {bits} for {self.dim} weights; {self.dim} weights "
                f"take {least}..{MAX_TILE_BITS} bits, so allowed are bits from "
                f"{least / self.dim:g} to {MAX_TILE_BITS / self.dim:g}, or another dim"
            )
        pulses, levels = pyramid_design.choose(self.dim, bits)
        return PyramidSpec(dim=self.dim, pulses=pulses, levels=levels)

    def fit(self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator) -> State:
        """`levels` float32 [G], ascending, proportional to the (weighted) root mean square."""
        scale = super().fit(X_IJE, weight_IJE, generator)["scale"]
        spec = self.spec()
        unit_G = pyramid_design.unit_levels(spec.dim, spec.pulses, spec.levels)
        return {"levels": unit_G.to(scale) * scale}

    def encode(
        self, X_IJE: Tensor, state: State, col: int = 0, weight_E: Tensor | None = None
    ) -> Tensor:
        check_finite(X_IJE, self)
        weight_EE = weight_E
        if weight_E is not None and weight_E.dim() == 1:
            weight_EE = torch.diag(weight_E)
        chunks = X_IJE.flatten(0, 1).split(max(reference.CHUNK // self.dim, 1))
        codes_NM = torch.cat([self._code(x_NE, state["levels"], weight_EE) for x_NE in chunks])
        return codes_NM.unflatten(0, X_IJE.shape[:2])

    def _code(self, x_NE: Tensor, levels_G: Tensor, weight_EE: Tensor | None) -> Tensor:
        spec = self.spec()
        y_EN = pyramid_nearest.nearest(x_NE, spec.pulses)
        if weight_EE is None:
            length_N = pyramid_nearest.length(x_NE.T, y_EN)
        else:
            y_EN, length_N = pyramid_weighted.nearest(x_NE.T, y_EN, weight_EE)
        level_N = nearest_entry(length_N[:, None], levels_G[:, None])[:, 0]
        number = reference.number_of(y_EN, spec.pulses)
        return reference.join(number, level_N, spec.levels, spec.tile_bits)

    def decode(self, codes_IJM: Tensor, state: State, col: int = 0) -> Tensor:
        spec = self.spec()
        X_NE = reference.decode_tiles(
            codes_IJM.flatten(0, 1), state["levels"], spec.dim, spec.pulses
        )
        return X_NE.unflatten(0, codes_IJM.shape[:2])

    def pack(self, codes_IJM: Tensor, state: State) -> dict[str, Tensor]:
        return {"codes": pack_wide(codes_IJM, self.spec().tile_bits), **state}

    def unpack(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Tensor, State]:
        spec = self.spec()
        _, num_tile_cols = spec.grid(rows, cols)
        codes_IJM = unpack_wide(tensors["codes"], spec.tile_bits, num_tile_cols)
        return codes_IJM, {"levels": tensors["levels"]}
