"""Running a quantized model: `VQLinear` and `VQEmbedding` in place of torch's modules.

May import: core, hf.
Start at `linear.py`, one activation through a quantized linear.
"""

from vqllm.runtime.cache import set_weight_cache
from vqllm.runtime.embedding import VQEmbedding
from vqllm.runtime.linear import VQLinear
from vqllm.runtime.packed import PackedModule
from vqllm.runtime.replace import describe, kept_bytes, replace_modules

__all__ = [
    "PackedModule",
    "VQEmbedding",
    "VQLinear",
    "describe",
    "kept_bytes",
    "replace_modules",
    "set_weight_cache",
]
