"""H = E[w x xᵀ] of an input group, accumulated in float32 over batches of tokens."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from vqllm.calibration.drift import Drift
from vqllm.core import linalg, threads
from vqllm.errors import NumericalError


@dataclass(frozen=True)
class InputGroup:
    """Linears of one layer that read the same input, by full name, in the order they run."""

    names: tuple[str, ...]
    side: str | None = None
    """of an expert: what its group has in common with those of the other experts"""


@dataclass
class InputHessian:
    """The running sum of w x xᵀ over all tokens so far, w = 1 unless given.

    `matrix` is the mean, float32 [C, C]. It is not centred: the error of a linear map depends on
    E[x xᵀ], the mean of x included. `total_CC` is the sum, on and above the diagonal only
    (linalg.symmetric).
    """

    total_CC: Tensor
    num_tokens: int = 0
    mass: float = 0.0
    """the sum of the weights"""
    drift: Drift | None = None
    """how far the input is from that of the original model, where it was measured"""
    blocks: Collection[int] | None = None
    """of `linalg.symmetric_blocks`, those that this process adds up; None for all"""

    @classmethod
    def empty(cls, num_features: int, device: torch.device) -> "InputHessian":
        return cls(torch.zeros(num_features, num_features, dtype=torch.float32, device=device))

    def add(self, x_NC: Tensor, weight_N: Tensor | None = None) -> None:
        """Add a batch of tokens, any float dtype, [N, C], each with its weight, 0 or more."""
        self.num_tokens += x_NC.shape[0]
        self.mass += len(x_NC) if weight_N is None else float(threads.total(weight_N))
        if self.blocks is not None and not self.blocks:
            return
        if weight_N is not None:
            x_NC = x_NC.float() * weight_N.sqrt()[:, None]
        linalg.add_symmetric(self.total_CC, x_NC, x_NC, self.blocks)

    @property
    def is_known(self) -> bool:
        """Whether any token came."""
        return self.mass > 0

    def matrix(self, name: str) -> Tensor:
        """E[w x xᵀ] / E[w]. NumericalError if no token came or a value is not finite."""
        if not self.is_known:
            raise NumericalError(f"no calibration token reached {name}: it has no Hessian")
        H = self.total_CC / self.mass
        if not bool(torch.isfinite(H).all()):
            raise NumericalError(
                f"the Hessian of {name} has {int((~torch.isfinite(H)).sum())} non-finite entries "
                f"after {self.num_tokens} tokens: an activation overflowed. Run the model in "
                "bfloat16 or float32 (--compute-dtype)."
            )
        return linalg.symmetric(H)
