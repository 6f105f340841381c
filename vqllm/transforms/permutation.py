"""A new order of the features of one side.

The order decides which columns and rows share a tile, a scale group or a codebook. (The order in
which a rounding rule visits the columns is its own option and costs nothing at run time.)
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vqllm.core.protocols import State, Transform
from vqllm.transforms.base import TRANSFORMS
from vqllm_kernels.transforms import PermutationSpec


@TRANSFORMS.register("permutation")
class Permutation(Transform):
    """Reorder the features of one side."""

    type: Literal["permutation"] = "permutation"
    by: Literal["hessian", "norm", "random"] = Field(
        default="norm",
        description="hessian (side in): descending diag H; norm: descending norm of the feature's "
        "weights; random: spreads like features over all tiles",
    )

    @model_validator(mode="after")
    def _hessian_is_of_the_input(self) -> "Permutation":
        if self.by == "hessian" and self.side == "out":
            raise ValueError("`by: hessian` needs `side: in`; on side out use norm or random")
        return self

    def spec(self, size: int) -> PermutationSpec:
        return PermutationSpec(side=self.side, size=size)

    def forward(
        self, W_RC: Tensor, H_CC: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, State]:
        spec = self.spec(self._size(W_RC))
        if self.by == "random":
            order = torch.randperm(spec.size, generator=generator).to(W_RC.device)
        else:
            key = (
                torch.diagonal(H_CC)
                if self.by == "hessian"
                else W_RC.square().sum(0 if self.side == "in" else 1)
            )
            order = torch.argsort(key, descending=True, stable=True)
        state = {"permutation": order.to(torch.int32)}
        return spec.forward(W_RC, state), spec.forward_hessian(H_CC, state), state
