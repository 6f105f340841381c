"""Post-training vector quantization of language-model weights.

    import vqllm                                     # transformers now loads quantized folders
    AutoModelForCausalLM.from_pretrained("demo-2bit")

Importing this package loads neither torch nor transformers: every public name is imported when it
is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vqllm._version import __version__ as __version__
from vqllm.integrations import _autoregister

if TYPE_CHECKING:
    from vqllm.api import compare, load, quantize, tune
    from vqllm.checkpoint.dequantize import dequantize_checkpoint as dequantize
    from vqllm.checkpoint.inspect import inspect_checkpoint as inspect
    from vqllm.checkpoint.reader import Checkpoint
    from vqllm.errors import CheckpointError, ModelError, RecipeError, VqllmError
    from vqllm.recipes import Recipe
    from vqllm.runtime import describe, set_weight_cache

_HOMES = {
    "Checkpoint": "vqllm.checkpoint.reader:Checkpoint",
    "CheckpointError": "vqllm.errors:CheckpointError",
    "ModelError": "vqllm.errors:ModelError",
    "Recipe": "vqllm.recipes:Recipe",
    "RecipeError": "vqllm.errors:RecipeError",
    "VqllmError": "vqllm.errors:VqllmError",
    "compare": "vqllm.api:compare",
    "dequantize": "vqllm.checkpoint.dequantize:dequantize_checkpoint",
    "describe": "vqllm.runtime:describe",
    "inspect": "vqllm.checkpoint.inspect:inspect_checkpoint",
    "load": "vqllm.api:load",
    "quantize": "vqllm.api:quantize",
    "set_weight_cache": "vqllm.runtime:set_weight_cache",
    "tune": "vqllm.api:tune",
}

__all__ = [  # noqa: RUF022 - by what one does, not by alphabet
    "quantize",
    "tune",
    "compare",
    "load",
    "inspect",
    "dequantize",
    "describe",
    "set_weight_cache",
    "Recipe",
    "Checkpoint",
    "VqllmError",
    "RecipeError",
    "ModelError",
    "CheckpointError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vqllm' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_autoregister.install()
