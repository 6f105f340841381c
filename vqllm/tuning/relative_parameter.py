"""A tensor that is trained as a change relative to its size."""

import torch
from torch import Tensor, nn

from vqllm.core.tensors import frozen


class RelativeParameter(nn.Module):
    """v + s δ in the dtype of the model, v the old value of a vector or a matrix.

    s = max(|v|, a tenth of the root mean square of v), so that large entries move more than small
    ones, and those that are 0 at all. Of a matrix of numbers of both signs, whose rows are vectors
    of features, it is the root mean square.
    """

    LEAST = 0.01
    """of the root mean square, for what is 0 throughout"""

    def __init__(self, old: Tensor, dtype: torch.dtype, least: float = LEAST) -> None:
        super().__init__()
        self.dtype = dtype
        old = old.float()
        size = old.square().mean().sqrt().clamp(min=least)
        self.register_buffer("old", old, persistent=False)
        of_features = old.ndim > 1 and bool((old < 0).any())
        unit = size if of_features else torch.maximum(old.abs(), 0.1 * size)
        self.register_buffer("unit", unit, persistent=False)
        self.delta = frozen(torch.zeros_like(old))

    def forward(self, delta: Tensor) -> Tensor:
        return self.wide(delta).to(self.dtype)

    def wide(self, delta: Tensor) -> Tensor:
        """The value in float32."""
        return self.get_buffer("old") + self.get_buffer("unit") * delta

    def value(self) -> Tensor:
        """What the model computes with."""
        return self(self.delta)
