"""What of a model was not quantized, and why."""

import re
from collections.abc import Collection, Mapping

from torch import nn

from vqllm.hf.linears import is_linear, shared_modules
from vqllm.plan.kept import router_parameters

SHARED = "several layers, or a layer and something outside, share it"


def why_not_quantized(
    model: nn.Module,
    layers: Collection[str],
    quantized: Collection[str],
    skip: tuple[str, ...],
    kept: Mapping[str, str],
) -> dict[str, str]:
    """A reason for every module that holds a matrix and was not quantized.

    Args:
        model: the whole model; its tensors may be on the meta device.
        layers: full names of the decoder layers.
        quantized: full names of the quantized linears.
        skip: the recipe's patterns.
        kept: what `Selection.kept` says.
    """
    reasons = {}
    shared = shared_modules(model, layers)
    routers = {
        f"{layer}.{name}": reason
        for layer in layers
        for name, reason in router_parameters(model.get_submodule(layer)).items()
    }
    for name, module in model.named_modules():
        if name in quantized:
            continue
        matrices = {
            key: tuple(value.shape)
            for key, value in module.named_parameters(recurse=False)
            if value.dim() >= 2
        }
        if matrices:
            inside = any(name.startswith(f"{layer}.") for layer in layers)
            reasons[name] = (
                SHARED
                if inside and module in shared
                else _reason(name, module, inside, matrices, skip, {**routers, **kept})
            )
    return reasons


def _reason(
    name: str,
    module: nn.Module,
    inside: bool,
    matrices: dict[str, tuple[int, ...]],
    skip: tuple[str, ...],
    kept: Mapping[str, str],
) -> str:
    for pattern in skip:
        if re.search(pattern, name):
            return f"left out by the recipe's skip pattern {pattern!r}"
    if name in kept:
        return kept[name]
    if isinstance(module, nn.Embedding):
        return "an embedding"
    if is_linear(module):
        if inside:
            return "no calibration token reached it"
        return "a linear outside the decoder layers"
    shapes = ", ".join(f"{key} {shape}" for key, shape in matrices.items())
    return f"{type(module).__name__} is not a torch.nn.Linear ({shapes})"
