"""A budget of bits, and which codec each linear gets for it."""

from vqllm.allocation.budget import Item, allocate
from vqllm.allocation.distortion import gaussian_mse

__all__ = ["Item", "allocate", "gaussian_mse"]
