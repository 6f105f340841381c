"""Models that load and do not run: one clear error in the place of a library's traceback."""

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

from torch import OutOfMemoryError

from vqllm.errors import ModelError

OURS = ("vqllm", "vqllm_kernels")
NO_MEMORY = ("can't allocate memory", "out of memory")
"""In torch's messages; it has no class of its own for the memory of the processor."""


@contextlib.contextmanager
def explained_run(model: Any) -> Iterator[None]:
    """Within, what transformers' own code raises while it runs the model is a ModelError.

    Numbers in config.json that decide no shape of a tensor, such as how many experts are chosen for
    a token, come to light here. Errors of other code pass through.
    """
    try:
        yield
    except (ModelError, OutOfMemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not _is_of_transformers(error) or any(words in reason for words in NO_MEMORY):
            raise
        raise ModelError(
            f"{type(model).__name__} does not run: transformers' code for it stops with "
            f"{reason!r}. Its config.json must be the one that was written with its weights: put "
            "that back, or fetch the model again."
        ) from error


def _is_of_transformers(error: Exception) -> bool:
    """Whether, of transformers and ourselves, transformers was called last."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package in OURS:
            return False
        if package in ("transformers", "transformers_modules"):
            return True
    return False
