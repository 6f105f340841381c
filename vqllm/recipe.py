"""Another name of `vqllm.recipes`, for programs that import from here."""

from vqllm.recipes import *  # noqa: F403
from vqllm.recipes import __all__ as __all__
