"""The registry of rounding rules."""

from vqllm.core.protocols import Rounding
from vqllm.core.registry import Registry

ROUNDINGS: Registry[Rounding] = Registry("rounding", Rounding, "vqllm.roundings")
