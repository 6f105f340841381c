"""Helpers for tensors."""

from torch import Tensor, nn


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that needs no gradient."""
    return nn.Parameter(tensor.detach(), requires_grad=False)
