"""One scale a feature, folded out of W and (side "in") into H.

    W' = W diag(1/d)    H' = diag(d) H diag(d)    x' = d · x        side "in"
    W' = diag(1/d) W                              y  = d · y'       side "out"

How d is chosen, for a code whose error is a constant c times the mean square of what it codes:

"rms", side "in": d_j is the root mean square of column j. Feedback rounding with H' = L D Lᵀ loses
c · mean(W'²) · tr D, and after a rotation tr D stays near its lower bound C · det(H')^(1/C). With
det H' = det H · Π d_j², the product mean(W'²) · Π d_j^(2/C) is smallest, by the inequality of
arithmetic and geometric means, when all columns of W' have the same norm.

"hessian", side "in": d_j = (‖W_:j‖² / H_jj)^(1/4). Rounding without feedback loses
c · mean(W'²) · tr H' = c/(R C) · Σ_j ‖W_:j‖²/d_j² · Σ_j d_j² H_jj, which by Cauchy and Schwarz is
smallest here. It is QuIP#'s optional rescaling (arXiv 2402.04396, its code).

"rms", side "out": d_r is the root mean square of row r. With one scale a matrix and a rotation of
the rows to follow, the loss c · Σ_r d_r² · mean_r(‖W_r‖²/d_r²) is smallest half-way, at
`alpha: 0.5`; without such a rotation `alpha: 1` gives each row the range of the code.

"max" uses the largest magnitude in place of the root mean square.

With `bits`, d is one of 2^bits levels, those of least squared error in log d. A scale that is off
by a few percent costs a loss of second order in that, while float16 takes 0.028 bits a weight for
the rows and as much for the columns of a matrix of 576 x 576. Proxy losses of E8P at 2 bits with
LDLQ after a full Hadamard transform of both sides, with rms scales of the columns (alpha 1) and the
rows (alpha 0.5) before it, against no scales, q, o, up, down of layers 1, 15, 28 of a Llama of 135
million weights, geometric mean: 0.958 in float16; 0.958, 0.960, 0.959 with 4, 3, 2 bits.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vqllm.core.protocols import State, Transform
from vqllm.transforms.base import TRANSFORMS
from vqllm_kernels.bitpack import pack_bits
from vqllm_kernels.transforms import CodedScaleSpec, ScaleSpec

LARGEST_SCALE = 256.0
"""Scales stay within [1/256, 256] around their geometric mean 1, so that x' = d · x of a float16
activation overflows only if x itself is above 255."""

LLOYD_PASSES = 50
"""Passes over the scales to place the levels."""


@TRANSFORMS.register("scale")
class Scale(Transform):
    """Divide the features of one side by a scale each."""

    type: Literal["scale"] = "scale"
    by: Literal["rms", "max", "hessian"] = Field(
        default="rms",
        description="rms or max: magnitude of the feature's weights; hessian (side in): "
        "(|W_j|^2 / H_jj)^(1/4), for rounding without feedback",
    )
    alpha: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="exponent of the scale; 0 leaves the weights as they are",
    )
    bits: Literal[1, 2, 3, 4, 5, 6, 7, 8, 16] = Field(
        default=16,
        description="of a stored scale: 16 is a float16 each, fewer a code into 2^bits levels",
    )

    @model_validator(mode="after")
    def _hessian_is_of_the_input(self) -> "Scale":
        if self.by == "hessian" and self.side == "out":
            raise ValueError("`by: hessian` needs `side: in`; on side out use rms or max")
        return self

    def spec(self, size: int) -> ScaleSpec:
        if self.bits == 16:
            return ScaleSpec(side=self.side, size=size)
        return CodedScaleSpec(side=self.side, size=size, bits=self.bits)

    def forward(
        self, W_RC: Tensor, H_CC: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, State]:
        spec = self.spec(self._size(W_RC))
        # Rounded before it is used, so that run time undoes exactly what was done.
        state = self._stored(self._normalise(self._magnitude(W_RC, H_CC)))
        return spec.forward(W_RC, state), spec.forward_hessian(H_CC, state), state

    def _magnitude(self, W_RC: Tensor, H_CC: Tensor) -> Tensor:
        """The scale of each feature before normalisation; 0 for a feature without weights or
        inputs."""
        axis = 0 if self.side == "in" else 1
        if self.by == "max":
            return W_RC.abs().amax(axis)
        rms = W_RC.square().mean(axis).sqrt()
        if self.by == "rms":
            return rms
        h = torch.diagonal(H_CC)
        # (‖W_j‖² / H_jj)^(1/4); a feature without input gets no scale.
        return torch.where(h > 0, (rms / h.clamp_min(1e-30).sqrt()).sqrt(), 0)

    def _normalise(self, magnitude: Tensor) -> Tensor:
        """d = magnitude^alpha with geometric mean 1; 1 for features that are zero."""
        used = magnitude > 0
        log_d = self.alpha * torch.where(used, magnitude, 1).log()
        log_d -= log_d.sum() / used.sum().clamp_min(1)
        d = torch.where(used, log_d.exp(), 1)
        return d.clamp(1 / LARGEST_SCALE, LARGEST_SCALE)

    def _stored(self, d: Tensor) -> State:
        """The stored tensors of the scales d."""
        if self.bits == 16:
            return {"scale": d.to(torch.float16)}
        log_d = d.cpu().double().log()
        log_levels, index = _lloyd(log_d, 1 << self.bits)
        return {
            "levels": log_levels.exp().to(d.device, torch.float16),
            "index": pack_bits(index, self.bits).to(d.device),
        }


def _lloyd(x_N: Tensor, num_levels: int) -> tuple[Tensor, Tensor]:
    """Ascending levels of least squared error, by Lloyd's algorithm from evenly spaced ranks, and
    the nearest one of each number."""
    ranks = (torch.arange(num_levels, dtype=x_N.dtype) + 0.5) / num_levels
    levels_K = x_N.sort().values[(ranks * len(x_N)).long()]
    for _ in range(LLOYD_PASSES):
        # The nearest level: the bounds lie half-way between neighbours. A level without numbers
        # stays where it is.
        codes_N = torch.bucketize(x_N, (levels_K[1:] + levels_K[:-1]) / 2)
        count_K = torch.bincount(codes_N, minlength=num_levels)
        sum_K = torch.zeros_like(levels_K).index_add_(0, codes_N, x_N)
        levels_K = torch.where(count_K > 0, sum_K / count_K.clamp_min(1), levels_K).sort().values
    return levels_K, torch.bucketize(x_N, (levels_K[1:] + levels_K[:-1]) / 2)
