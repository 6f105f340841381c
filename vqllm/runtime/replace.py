"""Torch's modules -> packed ones by module name, and what each of them runs on."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from vqllm.errors import CheckpointError
from vqllm.hf.linear_form import linear_form
from vqllm.hf.linears import is_linear, why_not_embedding
from vqllm.runtime import cache
from vqllm.runtime.embedding import VQEmbedding
from vqllm.runtime.joined_linears import JoinedLinears, input_key
from vqllm.runtime.linear import VQLinear
from vqllm.runtime.packed import PackedModule
from vqllm_kernels import dispatch
from vqllm_kernels.choice import bucket
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.lut import cpu as lookup

ADVICE = "config.json and the weights must be those of one checkpoint."


def replace_modules(
    model: nn.Module, specs: Mapping[str, LinearSpec], tied: Mapping[str, str] | None = None
) -> None:
    """Put an empty `VQLinear` or `VQEmbedding`, on the meta device, in the place of each named
    `nn.Linear` or `nn.Embedding`.

    Args:
        model: changed in place.
        specs: the specification of every quantized module by full name.
        tied: modules that use the packed tensors of another one of `specs`, which is the value.

    Raises:
        CheckpointError: there is nothing to replace, or the model has no linear or embedding of
            that name and size. The model is then unchanged.
    """
    if not specs:
        raise CheckpointError(
            "the checkpoint names no quantized module, so nothing of it would run quantized. Get "
            "an undamaged copy, or load it as an ordinary model without its quantization_config."
        )
    tied = tied or {}
    every = {**specs, **{name: specs[source] for name, source in tied.items()}}
    new = {name: _packed_like(_find(model, name, spec), spec) for name, spec in every.items()}
    for name, source in tied.items():
        new[name].tie(new[source])
    for name, module in new.items():
        module.train(model.get_submodule(name).training)
        model.set_submodule(name, module)
    for name, module in new.items():
        if isinstance(module, VQEmbedding):
            _put_last(model, name)


def _linear_like(module: Conv1D) -> nn.Linear:
    """The linear that computes what a Conv1D does, without values."""
    form = linear_form(module)
    assert form is not None, "it has one"
    return form.module  # type: ignore[return-value]


def _packed_like(old: nn.Linear | nn.Embedding, spec: LinearSpec) -> PackedModule:
    if isinstance(old, nn.Embedding):
        return VQEmbedding.like(old, spec)
    return VQLinear(spec, old.bias is not None, old.weight.dtype)


def _put_last(model: nn.Module, name: str) -> None:
    """Order modules such that what holds packed tensors comes after what does not.

    transformers takes the dtype of the first floating parameter for that of the model, also when
    it writes config.json. That is ordinarily the embedding's; now it would be that of a scale.
    """
    parts = name.split(".")[:-1]
    for i in range(len(parts) + 1):
        parent = model.get_submodule(".".join(parts[:i]))
        if isinstance(parent, nn.Sequential | nn.ModuleList):  # their order is what they compute
            continue
        children = sorted(parent._modules.items(), key=lambda item: _holds_packed(item[1]))
        parent._modules.clear()
        parent._modules.update(children)


def _holds_packed(module: nn.Module | None) -> bool:
    return module is not None and any(isinstance(m, PackedModule) for m in module.modules())


def _find(model: nn.Module, name: str, spec: LinearSpec) -> nn.Linear | nn.Embedding:
    what = f"the checkpoint says that {name} is quantized, {spec.rows} x {spec.cols}"
    try:
        module = model.get_submodule(name)
        if isinstance(module, Conv1D):
            module = _linear_like(module)
    except AttributeError as error:
        raise CheckpointError(
            f"{what}, but {type(model).__name__} has no module of that name. {ADVICE}"
        ) from error
    if is_linear(module):
        size = module.out_features, module.in_features
    elif isinstance(module, nn.Embedding) and why_not_embedding(module) is None:
        size = module.num_embeddings, module.embedding_dim
        if not spec.row_wise():
            raise CheckpointError(f"{what}, with rows that cannot be decoded one by one. {ADVICE}")
    else:
        raise CheckpointError(
            f"{what}, but it is a {type(module).__name__} in {type(model).__name__}. {ADVICE}"
        )
    if size != (spec.rows, spec.cols):
        raise CheckpointError(
            f"{what}, but {type(model).__name__} has {size[0]} x {size[1]} there. {ADVICE}"
        )
    return module


def group_inputs(model: nn.Module) -> list[JoinedLinears]:
    """Join the loaded linears of a model that read the same input.

    They are siblings with equal transforms of the input, random signs among them, which every input
    group draws for itself. Where a recipe has no such transform, linears stay alone; so do those
    whose tensors are offloaded.
    """
    groups = []
    for parent in model.modules():
        by_input: dict[object, list[VQLinear]] = {}
        for child in parent.children():
            if isinstance(child, VQLinear) and not child.is_offloaded():
                child.join(None)
                key = input_key(child)
                if key is not None:
                    by_input.setdefault(key, []).append(child)
        for members in by_input.values():
            if len({id(member) for member in members}) > 1:
                groups.append(JoinedLinears(members))
                for member in members:
                    member.join(groups[-1])
    return groups


@dataclass(frozen=True, kw_only=True)
class ChosenImplementation:
    """What a quantized module runs on. `num_rows` of x, or tokens, are those of one call."""

    name: str
    spec: LinearSpec
    device: torch.device
    num_rows: int
    implementation: str
    reason: str
    group: tuple[str, ...] = ()
    """the linears of the same input that are multiplied together with it, itself included"""


def describe(model: nn.Module, num_rows: tuple[int, ...] = (1, 2048)) -> list[ChosenImplementation]:
    """Which implementation each quantized linear or embedding of a model uses, and why.

    Args:
        num_rows: rows of x (tokens in one call) to answer for: generation feeds one a sequence, a
            prompt many.
    """
    packed = {n: module for n, module in model.named_modules() if isinstance(module, PackedModule)}
    groups: dict[int, list[str]] = {}
    for name, module in packed.items():
        if isinstance(module, VQLinear) and module.group is not None:
            groups.setdefault(id(module.group), []).append(name)
    return [
        _describe(name, module, rows, groups)
        for name, module in packed.items()
        for rows in num_rows
    ]


def _describe(
    name: str, module: PackedModule, num_rows: int, groups: Mapping[int, list[str]]
) -> ChosenImplementation:
    device = module.device
    faster_packed = isinstance(module, VQLinear) and module.beats_kept_weights(device, num_rows)
    if module.keeps_weights() and not faster_packed:
        implementation = "dense weights, kept"
        reason = f"weight cache {cache.weight_cache()!r} on {device.type}"
    elif isinstance(module, VQEmbedding):
        implementation, reason = "reference", "only the rows that are looked up are decoded"
    elif device.type == "meta":
        implementation, reason = "chosen when called", "its tensors are offloaded"
    else:
        assert isinstance(module, VQLinear)
        choice = _choice(module, num_rows)
        implementation, reason = choice.implementation, choice.reason
    return ChosenImplementation(
        name=name,
        spec=module.spec,
        device=device,
        num_rows=num_rows,
        implementation=implementation,
        reason=reason,
        group=()
        if implementation == "lookup"
        else tuple(groups.get(id(getattr(module, "group", None)), ())),
    )


def _choice(module: VQLinear, num_rows: int) -> dispatch.Choice:
    """The choice for the product; it is made here for a kind of call that there was not."""
    call = dispatch.Call(
        operation="matmul",
        spec=module.spec.format,
        device=module.device,
        dtype=module.weight.dtype,
        batch=bucket(num_rows),
    )
    made = {choice.call: choice for choice in dispatch.choices()}
    if call not in made:
        x = torch.empty(num_rows, module.in_features, dtype=call.dtype, device=call.device)
        dispatch.choose(x, module.spec.format)
        made = {choice.call: choice for choice in dispatch.choices()}
    return made[call]


def kept_bytes(model: nn.Module) -> int:
    """Bytes that quantized modules keep beside their packed tensors: decoded weights, factors of
    packed products, and copies of codes for look-ups."""
    modules = [module for module in model.modules() if isinstance(module, PackedModule)]
    dense = {id(m._dense): m._dense.nbytes for m in modules if m._dense is not None}
    packed = {id(tensor): tensor for module in modules for tensor in module.packed.values()}
    linears = [module for module in modules if isinstance(module, VQLinear)]
    groups = {id(linear.group): linear.group for linear in linears if linear.group is not None}
    factors = sum(owner.products.nbytes for owner in (*linears, *groups.values()))
    return (
        sum(dense.values()) + factors + sum(lookup.kept_bytes(tensor) for tensor in packed.values())
    )
