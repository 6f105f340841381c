"""Running a quantized model: `VQLinear` in place of `nn.Linear`."""

from vqllm.runtime.cache import set_weight_cache
from vqllm.runtime.linear import VQLinear
from vqllm.runtime.replace import describe, replace_linears

__all__ = ["VQLinear", "describe", "replace_linears", "set_weight_cache"]
