"""Random signs and a Hadamard transform: weights of one side come out nearly Gaussian.

    W' = W diag(s) Qᵀ    H' = Q diag(s) H diag(s) Qᵀ    x' = Q (s · x)        side "in"
    W' = Q diag(s) W                                    y  = s · (Qᵀ y')      side "out"

Source: Tseng et al., "QuIP#", arXiv 2402.04396, section 3 (randomized Hadamard transform).
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from vqllm.core.hadamard import block_for
from vqllm.core.protocols import State, Transform
from vqllm.transforms.base import TRANSFORMS
from vqllm_kernels.transforms import HadamardSpec


@TRANSFORMS.register("hadamard")
class RandomizedHadamard(Transform):
    """Randomized Hadamard transform of one side, for any size."""

    type: Literal["hadamard"] = "hadamard"
    block: int | None = Field(
        default=None,
        ge=1,
        description="features that are mixed together, at most: the largest Hadamard order up to "
        "this that divides the size; empty mixes all features of the side",
    )

    def spec(self, size: int) -> HadamardSpec:
        return HadamardSpec(side=self.side, size=size, block=block_for(size, self.block))

    def forward(
        self, W_RC: Tensor, H_CC: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, State]:
        spec = self.spec(self._size(W_RC))
        signs = 1 - 2 * torch.randint(2, (spec.size,), generator=generator)
        state = spec.pack_signs(signs.to(W_RC.device))
        return spec.forward(W_RC, state), spec.forward_hessian(H_CC, state), state
