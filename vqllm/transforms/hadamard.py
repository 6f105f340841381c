"""Random signs and a Hadamard transform: weights of one side come out nearly Gaussian.

    W' = W diag(s) Qᵀ    H' = Q diag(s) H diag(s) Qᵀ    x' = Q (s · x)        side "in"
    W' = Q diag(s) W                                    y  = s · (Qᵀ y')      side "out"

Source: Tseng et al., "QuIP#", arXiv 2402.04396, section 3 (randomized Hadamard transform).
"""

from typing import Literal, Self

import torch
from pydantic import Field, PrivateAttr
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

    _part: int | None = PrivateAttr(default=None)
    """Features of a process, which no block may reach beyond; None where all may be mixed."""

    def divided(self, part: int) -> Self:
        """One that mixes all features of a process, or blocks of those where it has `block`."""
        own = self.model_copy()
        own._part = part
        return own

    def spec(self, size: int) -> HadamardSpec:
        part = self._part or size
        block = block_for(part, self.block)
        if block is None and part < size:
            block = part
        return HadamardSpec(side=self.side, size=size, block=block)

    def forward(
        self, W_RC: Tensor, H_CC: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, State]:
        spec = self.spec(self._size(W_RC))
        signs = 1 - 2 * torch.randint(2, (spec.size,), generator=generator)
        state = spec.pack_signs(signs.to(W_RC.device))
        return spec.forward(W_RC, state), spec.forward_hessian(H_CC, state), state
