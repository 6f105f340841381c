"""The registry of transforms."""

from vqllm.registry import Registry
from vqllm.types import Transform

TRANSFORMS: Registry[Transform] = Registry("transform")
