"""The registry of tuning steps."""

from vqllm.registry import Registry
from vqllm.types import Tuning

TUNINGS: Registry[Tuning] = Registry("tuning")
