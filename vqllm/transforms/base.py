"""The registry of transforms."""

from vqllm.core.protocols import Transform
from vqllm.core.registry import Registry

TRANSFORMS: Registry[Transform] = Registry("transform", Transform, "vqllm.transforms")
