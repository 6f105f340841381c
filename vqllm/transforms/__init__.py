"""Invertible changes of W and H before coding, undone on activations at run time.

May import: core.
Start at `hadamard.py`; an empty list of transforms is the identity.
"""

from vqllm.transforms import hadamard, permutation, scale, wush
from vqllm.transforms.base import TRANSFORMS

__all__ = ["TRANSFORMS", "hadamard", "permutation", "scale", "wush"]
