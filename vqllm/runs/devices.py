"""The devices and dtypes that users name."""

import os

import torch

from vqllm.errors import ModelError, RecipeError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def device_of(name: str | None) -> torch.device:
    """A device by name; for None a GPU if there is one, else the CPU.

    Raises:
        ModelError: torch does not see it here.
    """
    if name is None and torch.cuda.is_available():
        # One of several processes takes the GPU of its number.
        own = os.environ.get("LOCAL_RANK", "0")
        return torch.device("cuda", int(own)) if own != "0" else torch.device("cuda")
    if name is None:
        return torch.device("cpu")
    known = _names()
    if name not in known:
        raise ModelError(
            f"{name!r} is no device that torch sees here: use one of {', '.join(known)}."
        )
    return torch.device(name)


def dtype_of(name: str | None) -> torch.dtype | None:
    """A compute dtype by name; None for None. RecipeError where there is none."""
    if name is not None and name not in DTYPES:
        raise RecipeError(f"compute dtype {name!r}: use {', '.join(DTYPES)}.")
    return DTYPES[name] if name else None


def _names() -> list[str]:
    """The names of the devices that a model can run on, here and now."""
    names = ["cpu"]
    for kind, backend in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        if backend.is_available():
            names += [kind, *(f"{kind}:{i}" for i in range(backend.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names
