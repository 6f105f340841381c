"""Uniform scalar quantization: W = scale · (q − zero), a scale and a zero point for each group."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from vqllm.codecs.base import CODECS, check_finite
from vqllm.errors import NumericalError
from vqllm.types import Codec, State
from vqllm_kernels.bitpack import pack_bits, unpack_bits
from vqllm_kernels.uniform.spec import UniformSpec

_CLIP_RATIOS = tuple(1 - 0.01 * i for i in range(86))
"""Searched by clip: mse. The best ratio is 0.37 for two bits and rows of 2^15 Gaussian weights."""
_MIN_SCALE = 2.0**-24
"""The smallest float16 above zero."""


@CODECS.register("uniform")
class Uniform(Codec):
    """Integers on a uniform grid that contains zero; one scale for `group` columns of a row."""

    type: Literal["uniform"] = "uniform"
    bits: int = Field(4, ge=1, le=8, description="bits of an integer")
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
        return UniformSpec(bits=self.bits, group=self.group)

    def fit(
        self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator
    ) -> State:
        """`scale` float16 and `zero` uint8, both [I, G]; the clipping error is weighted."""
        check_finite(X_IJE, self)
        X_IGB = self._grouped(X_IJE[..., 0].float())
        low_IG = X_IGB.amin(2).clamp(max=0)
        high_IG = X_IGB.amax(2).clamp(min=0)
        if self.clip == "minmax":
            scale_IG, zero_IG = self._grid(low_IG, high_IG)
            return {"scale": scale_IG, "zero": zero_IG}

        weight = 1.0 if weight_IJE is None else weight_IJE.expand_as(X_IJE)[..., 0].float()
        weight_IGB = self._grouped(torch.ones_like(X_IJE[..., 0]) * weight)
        best_IG = torch.full_like(low_IG, torch.inf)
        scale_IG, zero_IG = self._grid(low_IG, high_IG)
        for ratio in _CLIP_RATIOS:
            scale, zero = self._grid(low_IG * ratio, high_IG * ratio)
            q_IGB = self._round(X_IGB, scale[..., None], zero[..., None])
            back_IGB = _dequantize(q_IGB, scale[..., None], zero[..., None])
            error_IG = (weight_IGB * (X_IGB - back_IGB) ** 2).sum(2)
            better_IG = error_IG < best_IG
            best_IG = torch.where(better_IG, error_IG, best_IG)
            scale_IG = torch.where(better_IG, scale, scale_IG)
            zero_IG = torch.where(better_IG, zero, zero_IG)
        return {"scale": scale_IG, "zero": zero_IG}

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
        return {"codes": pack_bits(codes_IJM[..., 0], self.bits), **state}

    def unpack(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Tensor, State]:
        codes_IJM = unpack_bits(tensors["codes"], self.bits, cols)[..., None]
        return codes_IJM, {"scale": tensors["scale"], "zero": tensors["zero"]}

    def _grouped(self, X_IJ: Tensor) -> Tensor:
        """[I, G, columns of a group], the last group filled up with zeros."""
        group = self.group or X_IJ.shape[1]
        missing = -X_IJ.shape[1] % group
        return torch.nn.functional.pad(X_IJ, (0, missing)).unflatten(1, (-1, group))

    def _grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale, as stored, and zero point that cover low..high."""
        scale = (high - low) / (2**self.bits - 1)
        if scale.max() > torch.finfo(torch.float16).max:
            raise NumericalError(
                f"codec uniform: weights up to {float(high.max() - low.min()):.3g} need a scale of "
                f"{float(scale.max()):.3g}, more than float16 holds (65504). Scale the weights down "
                "with a scaling transform, or use a codec with a float32 scale (e8p)."
            )
        stored = torch.where(scale > 0, scale.clamp(min=_MIN_SCALE), 1.0).half()
        zero = (-low / stored.float()).round().clamp(0, 2**self.bits - 1)
        return stored, zero.to(torch.uint8)

    def _round(self, X: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (X / scale.float() + zero.float()).round().clamp(0, 2**self.bits - 1)

    def _of_columns(self, state: State, col: int, num_cols: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each of the columns from `col` on."""
        column_J = torch.arange(col, col + num_cols, device=state["scale"].device)
        group_J = column_J // self.group if self.group else torch.zeros_like(column_J)
        return state["scale"][:, group_J], state["zero"][:, group_J]


def _dequantize(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return scale.float() * (q - zero.float())
