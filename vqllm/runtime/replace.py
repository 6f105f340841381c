"""`nn.Linear` -> `VQLinear` by module name, and what each of them runs on."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from vqllm.errors import CheckpointError
from vqllm.linears import is_linear
from vqllm.runtime import cache
from vqllm.runtime.linear import VQLinear
from vqllm_kernels import dispatch
from vqllm_kernels.choice import bucket
from vqllm_kernels.linear import LinearSpec


def replace_linears(model: nn.Module, linears: Mapping[str, LinearSpec]) -> None:
    """Put an empty `VQLinear`, on the meta device, in the place of each named `nn.Linear`.

    Args:
        model: changed in place.
        linears: the specification of every quantized linear by full module name.

    Raises:
        CheckpointError: there is nothing to replace, or the model has no linear of that name and
            size. The model is then unchanged.
    """
    if not linears:
        raise CheckpointError(
            "the checkpoint names no quantized module, so nothing of it would run quantized. Get "
            "an undamaged copy, or load it as an ordinary model without its quantization_config."
        )
    found = {name: _find(model, name, spec) for name, spec in linears.items()}
    for name, old in found.items():
        new = VQLinear(linears[name], old.bias is not None, old.weight.dtype)
        new.train(old.training)
        model.set_submodule(name, new)


def _find(model: nn.Module, name: str, spec: LinearSpec) -> nn.Linear:
    what = f"the checkpoint says that {name} is a quantized linear of {spec.rows} x {spec.cols}"
    advice = "config.json and the weights must be those of one checkpoint."
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(
            f"{what}, but {type(model).__name__} has no module of that name. {advice}"
        ) from error
    if not is_linear(module):
        raise CheckpointError(
            f"{what}, but it is a {type(module).__name__} in {type(model).__name__}. {advice}"
        )
    if (module.out_features, module.in_features) != (spec.rows, spec.cols):
        raise CheckpointError(
            f"{what}, but {type(model).__name__} has {module.out_features} x "
            f"{module.in_features} there. {advice}"
        )
    return module


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a quantized linear runs on. `num_rows` of x are those of one call."""

    name: str
    spec: LinearSpec
    device: torch.device
    num_rows: int
    implementation: str
    reason: str


def describe(model: nn.Module, num_rows: tuple[int, ...] = (1, 2048)) -> list[Run]:
    """Which implementation each quantized linear of a model uses, and why.

    Args:
        num_rows: rows of x (tokens in one call) to answer for: generation feeds one a sequence, a
            prompt many.
    """
    return [
        _describe(name, module, rows)
        for name, module in model.named_modules()
        if isinstance(module, VQLinear)
        for rows in num_rows
    ]


def _describe(name: str, module: VQLinear, num_rows: int) -> Run:
    device = module.device
    if module.keeps_weights():
        implementation = "dense weights, kept"
        reason = f"weight cache {cache.weight_cache()!r} on {device.type}"
    elif device.type == "meta":
        implementation, reason = "chosen when called", "its tensors are offloaded"
    else:
        choice = _choice(module, num_rows)
        implementation, reason = choice.implementation, choice.reason
    return Run(
        name=name,
        spec=module.spec,
        device=device,
        num_rows=num_rows,
        implementation=implementation,
        reason=reason,
    )


def _choice(module: VQLinear, num_rows: int) -> dispatch.Choice:
    """The choice for the product; a kind of call that was never made is made once, with zeros."""
    call = dispatch.Call(
        operation="matmul",
        spec=module.spec.format,
        device=module.device,
        dtype=module.weight.dtype,
        batch=bucket(num_rows),
    )
    made = {choice.call: choice for choice in dispatch.choices()}
    if call not in made:
        with torch.no_grad():
            zeros = torch.zeros(num_rows, module.in_features, dtype=call.dtype, device=call.device)
            module.packed_product(zeros)
        made = {choice.call: choice for choice in dispatch.choices()}
    return made[call]
