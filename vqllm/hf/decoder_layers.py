"""Where a model has its decoder layers, and the linears in them."""

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from vqllm.errors import ModelError
from vqllm.hf.linears import decoder_name, is_linear


def linears_of(
    layer: nn.Module, layer_name: str, shared: Collection[nn.Module] = ()
) -> dict[str, nn.Linear]:
    """The linears of a layer by full name, without those in `shared`, in the order of the module
    tree."""
    return {
        f"{layer_name}.{name}": module
        for name, module in layer.named_modules()
        if is_linear(module) and module not in shared
    }


def layer_names(model: nn.Module) -> list[str]:
    """Full names of the decoder layers: of the list of modules with most parameters in the
    model's text decoder, or in the model where it has no decoder with such a list. Lists in models
    of their own inside of it, such as towers for images, come after one of as many entries as the
    text has layers."""
    inside = decoder_name(model)
    best = _largest_list(model, inside) or _largest_list(model, "")
    if not best:
        raise ModelError(
            f"{type(model).__name__} has no list of layers (torch.nn.ModuleList) with weights, so "
            "its layers cannot be quantized one by one"
        )
    layers: nn.ModuleList = model.get_submodule(best)  # type: ignore[assignment]
    return [f"{best}.{i}" for i in range(len(layers))]


def _largest_list(model: nn.Module, inside: str) -> str:
    """Full name of the list of modules with most parameters below a module, not itself in a list;
    "" where there is none."""
    sizes: dict[str, int] = {}
    for name, module in model.get_submodule(inside).named_modules(prefix=inside):
        if isinstance(module, nn.ModuleList) and not any(
            isinstance(parent, nn.ModuleList) for parent in _parents(model, name)
        ):
            sizes[name] = sum(p.numel() for p in module.parameters())
    config: Any = getattr(model, "config", None)
    number = getattr(config.get_text_config(), "num_hidden_layers", None) if config else None
    outer = [*_parents(model, f"{inside}.layers")] if inside else []
    own = {
        name: size
        for name, size in sizes.items()
        if len(model.get_submodule(name)) == number  # type: ignore[arg-type]
        and not any(
            isinstance(parent, PreTrainedModel) and parent not in outer
            for parent in _parents(model, name)
        )
    }
    found = own if any(own.values()) else sizes
    best = max(found, key=found.__getitem__, default="")
    return best if found.get(best) else ""


def _parents(model: nn.Module, name: str) -> Iterator[nn.Module]:
    parts = name.split(".")[:-1]
    for i in range(1, len(parts) + 1):
        yield model.get_submodule(".".join(parts[:i]))
