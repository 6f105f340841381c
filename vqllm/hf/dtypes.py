"""Which tensors of a model are of another dtype than the model, once transformers has loaded it."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation


def kept_dtypes(
    model: nn.Module,
    own: PreTrainedModel,
    dtype: torch.dtype,
    origin: Callable[[str], str] = lambda name: name,
) -> dict[str, torch.dtype]:
    """The dtypes of parameters and buffers that are not `dtype` in a model loaded in `dtype`, by
    full name: a module may make them so, and a class may name parts that stay in float32.

    Args:
        model: whose tensors are wanted; it may be on the meta device, and in linear form.
        own: made in `dtype`, as transformers has it; it may be on the meta device.
        origin: which tensor of `own` a tensor of `model` is, or is a part of.
    """
    made = dict(tensors_of(own))
    plan = own._get_dtype_plan(dtype)
    matching, patterns, _ = build_glob_alternation(list(plan)) if plan else (None, {}, {})
    kept = {}
    for name, tensor in tensors_of(model):
        whole = origin(name)
        found = matching.search(whole) if matching is not None else None
        if found is not None and found.lastgroup is not None:
            kept[name] = plan[patterns[found.lastgroup]]
        elif whole in made:
            kept[name] = made[whole].dtype
        if not tensor.is_floating_point() or kept.get(name) == dtype:
            kept.pop(name, None)
    return kept


def tensors_of(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by full name; those in several places come once for each."""
    yield from model.named_parameters(prefix, remove_duplicate=False)
    yield from model.named_buffers(prefix, remove_duplicate=False)
