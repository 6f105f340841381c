"""Tensors that a loaded model needs and its checkpoint does not have: refused.

transformers fills them with random values and logs it. For a head that the checkpoint is not made
for (a classifier on a language model) that is what one wants; for a norm it is a broken model.
"""

import contextlib
import re
from collections.abc import Collection
from typing import Any

from vqllm.checkpoint.shards import DAMAGED
from vqllm.core.listing import listed
from vqllm.errors import CheckpointError, ModelError
from vqllm.hf.classes import is_own_class


def refuse_missing(model: Any, stored: Collection[str]) -> None:
    """Raise CheckpointError unless everything was loaded that this class must have.

    Args:
        model: after transformers loaded it. What was loaded or is tied has transformers' mark;
            what is on the meta device is offloaded.
        stored: names of the tensors in the files.
    """
    tensors = model.state_dict(keep_vars=True)
    missing = {
        name
        for name, tensor in tensors.items()
        if not tensor.is_meta and not hasattr(tensor, "_is_hf_initialized")
    }
    if not missing or len(missing) == len(tensors):
        return  # without a mark on any tensor, a missing mark does not mean a missing tensor
    may_lack = [re.compile(own) for own in model._keys_to_ignore_on_load_missing or ()]
    missing = {
        name
        for name in missing
        if _must_have(model, name) and not any(own.search(name) for own in may_lack)
    }
    if not missing:
        return
    # The packed tensors of a module that config.json forgot are there, and its weights are not.
    modules = {name.rpartition(".")[0] for name in stored}
    packed = sorted(name for name in missing if name.rpartition(".")[0] in modules)
    cause = (
        f"The files have other tensors of {packed[0].rpartition('.')[0]}: config.json does not say "
        "that they are packed. It must be the one that was written with them. "
        if packed
        else ""
    )
    raise CheckpointError(
        f"the checkpoint lacks {len(missing)} of the tensors of a {type(model).__name__}: "
        f"{listed(missing)}. {cause}{DAMAGED}"
    )


def refuse_untied(model: Any) -> None:
    """Raise ModelError where tensors that are to be one are two: then one was never loaded.

    transformers' loader exchanges functions of its classes while it runs, that which ties weights
    among them. Two threads that load models at once leave them exchanged, for all that is loaded
    afterwards (seen with 5.23: a head of uninitialized memory).
    """
    for name, source in model.all_tied_weights_keys.items():
        module = model.get_submodule(name.rpartition(".")[0])
        if hasattr(module, "_hf_hook"):  # of accelerate, which may hold the tensors elsewhere
            continue
        with contextlib.suppress(AttributeError):
            one, other = model.get_parameter_or_buffer(name), model.get_parameter_or_buffer(source)
            if one is not other:
                raise ModelError(
                    f"transformers did not tie {name} to {source}. It does so when several threads "
                    "load models at once, and goes on with it: start the process again, and load "
                    "one model after the other."
                )


def _must_have(model: Any, name: str) -> bool:
    """Whether a tensor belongs to what the checkpoint was made of: all of a model of its own class,
    and what every other class on it has in common with that."""
    base = model.base_model
    return is_own_class(model) or base is model or name.startswith(f"{model.base_model_prefix}.")
