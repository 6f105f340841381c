"""Uniform scalar quantization: W = scale · (q − zero), a scale and a zero point for each group."""

from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from vqllm.codecs.base import CODECS, check_finite
from vqllm.core.protocols import Codec, Point, State
from vqllm.errors import NumericalError
from vqllm_kernels.bitpack import pack_bits, unpack_bits
from vqllm_kernels.uniform.spec import UniformSpec

_COARSE_STEPS = tuple(0.05 * i for i in range(18))
_FINE_STEPS = tuple(0.01 * i for i in (0, *range(-4, 0), *range(1, 5)))
"""Steps down from the whole range of a group, then around the best of them. Two bits need the most
clipping: 0.35 of the range in rows of 2^18 Gaussian weights."""
_MIN_SCALE = 2.0**-24
"""The smallest float16 above zero."""


@CODECS.register("uniform")
class Uniform(Codec):
    """Integers on a uniform grid that contains zero; one scale for `group` columns of a row."""

    # A grid with an integer zero point contains zero, so it cannot be symmetric: its optimum is
    # above that of Max (0.1188, 0.03744, 0.01154). Found by trying scales and zero points.
    points: ClassVar[tuple[Point, ...]] = tuple(
        Point(
            label="uniform, whole rows",
            options={"bits": bits, "group": None},
            mse=mse,
            source="by trying scales and zero points",
        )
        for bits, mse in ((2, 0.1490), (3, 0.0406), (4, 0.0119))
    )

    # `bits` in a recipe; as an attribute that name is the method that counts the stored bits.
    model_config = ConfigDict(serialize_by_alias=True)

    type: Literal["uniform"] = "uniform"
    code_bits: int = Field(4, alias="bits", ge=1, le=8, description="bits of an integer")
    group: int | None = Field(
        128, ge=1, description="columns of a row that share a scale; null is the whole row"
    )
    clip: Literal["minmax", "mse"] = Field(
        "mse",
        description="range of a group: all of its weights (minmax), or clipped by the ratio that "
        "minimises the squared error (mse)",
    )

    @property
    def tile(self) -> tuple[int, int]:
        return (1, 1)

    def spec(self) -> UniformSpec:
        return UniformSpec(bits=self.code_bits, group=self.group)

    def fit(self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator) -> State:
        """`scale` float16 and `zero` uint8, both [I, G]; the clipping error is weighted."""
        check_finite(X_IJE, self)
        # B columns of each group G. The range contains zero; `ratio` is the part of it that is left
        # after clipping.
        X_IGB = self._grouped(X_IJE[..., 0].float())
        low_IG = X_IGB.amin(2).clamp(max=0)
        high_IG = X_IGB.amax(2).clamp(min=0)
        ratio_IG = torch.ones_like(low_IG)
        if self.clip == "mse":
            weight_IGB = None
            if weight_IJE is not None:
                weight_IGB = self._grouped(weight_IJE.expand_as(X_IJE)[..., 0].float())
            for steps in (_COARSE_STEPS, _FINE_STEPS):
                ratio_IG = self._best_ratio(X_IGB, weight_IGB, ratio_IG, steps)
        scale_IG, zero_IG = self._grid(low_IG * ratio_IG, high_IG * ratio_IG)
        return {"scale": scale_IG, "zero": zero_IG}

    def _best_ratio(
        self,
        X_IGB: Tensor,
        weight_IGB: Tensor | None,
        start_IG: Tensor,
        steps: tuple[float, ...],
    ) -> Tensor:
        """The clipping ratio of each group, among start − steps, with the least squared error."""
        low_IG, high_IG = X_IGB.amin(2).clamp(max=0), X_IGB.amax(2).clamp(min=0)
        best_IG, least_IG = start_IG, torch.full_like(start_IG, torch.inf)
        for step in steps:
            ratio_IG = (start_IG - step).clamp(max=1)
            scale, zero = self._grid(low_IG * ratio_IG, high_IG * ratio_IG)
            scale, zero = scale[..., None], zero[..., None]
            square_IGB = (X_IGB - _dequantize(self._round(X_IGB, scale, zero), scale, zero)) ** 2
            error_IG = (square_IGB if weight_IGB is None else weight_IGB * square_IGB).sum(2)
            best_IG = torch.where(error_IG < least_IG, ratio_IG, best_IG)
            least_IG = torch.minimum(error_IG, least_IG)
        return best_IG

    def encode(
        self, X_IJE: Tensor, state: State, col: int = 0, weight_E: Tensor | None = None
    ) -> Tensor:
        check_finite(X_IJE, self)
        scale_IJ, zero_IJ = self._of_columns(state, col, X_IJE.shape[1])
        return self._round(X_IJE[..., 0], scale_IJ, zero_IJ).to(torch.int32)[..., None]

    def decode(self, codes_IJM: Tensor, state: State, col: int = 0) -> Tensor:
        scale_IJ, zero_IJ = self._of_columns(state, col, codes_IJM.shape[1])
        return _dequantize(codes_IJM[..., 0].float(), scale_IJ, zero_IJ)[..., None]

    def pack(self, codes_IJM: Tensor, state: State) -> dict[str, Tensor]:
        return {"codes": pack_bits(codes_IJM[..., 0], self.code_bits), **state}

    def unpack(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Tensor, State]:
        codes_IJM = unpack_bits(tensors["codes"], self.code_bits, cols)[..., None]
        return codes_IJM, {"scale": tensors["scale"], "zero": tensors["zero"]}

    def _grouped(self, X_IJ: Tensor) -> Tensor:
        """[I, G, columns of a group], the last group filled up with zeros."""
        group = self.group or X_IJ.shape[1]
        missing = -X_IJ.shape[1] % group
        return torch.nn.functional.pad(X_IJ, (0, missing)).unflatten(1, (-1, group))

    def _grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale, as stored, and zero point that cover low..high."""
        scale = (high - low) / (2**self.code_bits - 1)
        if scale.max() > torch.finfo(torch.float16).max:
            raise NumericalError(
                f"codec uniform: weights up to {float(high.max() - low.min()):.3g} need a scale "
                f"of {float(scale.max()):.3g}, more than float16 holds (65504). Scale the weights "
                "down with a scaling transform, or use a codec with a float32 scale (e8p)."
            )
        stored = torch.where(scale > 0, scale.clamp(min=_MIN_SCALE), 1.0).half()
        zero = (-low / stored.float()).round().clamp(0, 2**self.code_bits - 1)
        return stored, zero.to(torch.uint8)

    def _round(self, X: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (X / scale.float() + zero.float()).round().clamp(0, 2**self.code_bits - 1)

    def _of_columns(self, state: State, col: int, num_cols: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each of the columns from `col` on."""
        column_J = torch.arange(col, col + num_cols, device=state["scale"].device)
        group_J = column_J // self.group if self.group else torch.zeros_like(column_J)
        return state["scale"][:, group_J], state["zero"][:, group_J]


def _dequantize(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return scale.float() * (q - zero.float())
