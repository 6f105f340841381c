"""Rules that choose codes, given H."""

from vqllm.rounding import ldlq, nearest
from vqllm.rounding.base import ROUNDINGS

__all__ = ["ROUNDINGS", "ldlq", "nearest"]
