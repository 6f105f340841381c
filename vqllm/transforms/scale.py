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
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vqllm.transforms.base import TRANSFORMS
from vqllm.types import State, Transform
from vqllm_kernels.transforms import ScaleSpec

LARGEST_SCALE = 256.0
"""Scales stay within [1/256, 256] around their geometric mean 1, so that x' = d · x of a float16
activation overflows only if x itself is above 255."""


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

    @model_validator(mode="after")
    def _hessian_is_of_the_input(self) -> "Scale":
        if self.by == "hessian" and self.side == "out":
            raise ValueError("`by: hessian` needs `side: in`; on side out use rms or max")
        return self

    def spec(self, size: int) -> ScaleSpec:
        return ScaleSpec(side=self.side, size=size)

    def forward(
        self, W_RC: Tensor, H_CC: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, State]:
        spec = self.spec(self._size(W_RC))
        # Rounded before it is used, so that run time undoes exactly what was done.
        state = {"scale": self._normalise(self._magnitude(W_RC, H_CC)).to(torch.float16)}
        return spec.forward(W_RC, state), spec.forward_hessian(H_CC, state), state

    def _magnitude(self, W_RC: Tensor, H_CC: Tensor) -> Tensor:
        """The scale of each feature before normalisation; 0 where there is nothing to scale."""
        axis = 0 if self.side == "in" else 1
        if self.by == "max":
            return W_RC.abs().amax(axis)
        rms = W_RC.square().mean(axis).sqrt()
        if self.by == "rms":
            return rms
        h = torch.diagonal(H_CC)
        return torch.where(h > 0, (rms / h.clamp_min(1e-30).sqrt()).sqrt(), 0)

    def _normalise(self, magnitude: Tensor) -> Tensor:
        """d = magnitude^alpha with geometric mean 1; 1 for features that are zero."""
        used = magnitude > 0
        log_d = self.alpha * torch.where(used, magnitude, 1).log()
        log_d -= log_d.sum() / used.sum().clamp_min(1)
        d = torch.where(used, log_d.exp(), 1)
        return d.clamp(1 / LARGEST_SCALE, LARGEST_SCALE)
