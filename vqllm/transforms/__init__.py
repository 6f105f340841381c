"""Invertible changes of W and H before coding. An empty list of them is the identity."""

from vqllm.transforms import hadamard, permutation, scale, wush
from vqllm.transforms.base import TRANSFORMS

__all__ = ["TRANSFORMS", "hadamard", "permutation", "scale", "wush"]
