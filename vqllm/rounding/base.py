"""The registry of rounding rules."""

from vqllm.registry import Registry
from vqllm.types import Rounding

ROUNDINGS: Registry[Rounding] = Registry("rounding")
