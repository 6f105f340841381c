"""A model whose matrices are all `nn.Linear`: experts and GPT-2's Conv1D as linears.

    experts.gate_up_proj [E, 2 I, C]  ─►  experts.0.gate_proj [I, C], experts.0.up_proj [I, C], ...
    c_attn (Conv1D) weight [C, R]     ─►  c_attn (Linear) weight [R, C]

Each parameter of the new form is a part of one tensor of transformers' own model; `Part` says
which, so that it can be read from there and written back.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from vqllm.hf.experts import (
    ExpertsAndIdentity,
    LinearExperts,
    ReshapedExperts,
    SortedExperts,
    StackedExperts,
    takes_halves,
)


@dataclass(frozen=True)
class Part:
    """Where a parameter of the linear form is in a tensor of transformers' own model."""

    tensor: str
    """full name of that tensor"""
    expert: int | None = None
    """index in its first axis"""
    rows: tuple[int, int] | None = None
    """first and last plus one, of what the index leaves, before it is transposed"""
    columns: tuple[int, int] | None = None
    """likewise of its last axis"""
    transposed: bool = False

    def of(self, whole: Tensor) -> Tensor:
        """The part of the whole tensor, without a copy."""
        part = whole if self.expert is None else whole[self.expert]
        if self.rows is not None:
            part = part[slice(*self.rows)]
        if self.columns is not None:
            part = part[..., slice(*self.columns)]
        return part.mT if self.transposed else part


@dataclass(frozen=True)
class LinearForm:
    """A module in linear form, and its parameters as parts of the original's, by their names in
    the two modules."""

    module: nn.Module
    parts: Mapping[str, Part]


def to_linear_form(model: nn.Module, *, only_experts: bool = False) -> dict[str, Part]:
    """Put experts and Conv1D modules of a model in linear form, in place; their values are lost
    unless they are on the meta device.

    Args:
        model: on the meta device.
        only_experts: leave Conv1D modules as they are.

    Returns:
        the parts by the full name of the parameter in the new form.
    """
    parts: dict[str, Part] = {}
    made: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules()):
        form = None if only_experts and isinstance(module, Conv1D) else linear_form(module)
        if form is not None:
            model.set_submodule(name, form.module)
            for own, part in form.parts.items():
                parts[f"{name}.{own}"] = replace(part, tensor=f"{name}.{part.tensor}")
            _share_parts(module, form, made)
    return parts


def _share_parts(module: nn.Module, form: LinearForm, made: dict[int, nn.Module]) -> None:
    """Let parts of a tensor that another module has too be shared by the linear forms of both.

    Args:
        made: the first form with parts of each tensor so far, by the tensor's id.
    """
    ids = {name: id(tensor) for name, tensor in module.named_parameters()}
    other = {name: made.setdefault(ids[name], form.module) for name in ids}
    for own, part in form.parts.items():
        if other[part.tensor] is not form.module:
            owner, _, key = own.rpartition(".")
            shared = other[part.tensor].get_parameter(own)
            setattr(form.module.get_submodule(owner), key, shared)


def linear_form(module: nn.Module) -> LinearForm | None:
    """A module that computes the same with linears, on the meta device; None if it holds no
    matrices in another form, or in one that is not known."""
    if isinstance(module, Conv1D):
        return _of_conv1d(module)
    if is_fused(module):
        return _of_experts(module)
    return None


def has_linear_form(module: nn.Module) -> bool:
    """Whether `linear_form` has an answer, without making it."""
    return isinstance(module, Conv1D) or is_fused(module)


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the matrices of several experts in one parameter, in a known way."""
    return _kind_of(module) is not None


def _of_conv1d(module: Conv1D) -> LinearForm:
    rows, cols = module.nf, module.nx
    linear = nn.Linear(cols, rows, device="meta", dtype=module.weight.dtype)
    linear.weight.requires_grad_(False)
    return LinearForm(linear.train(module.training), {"weight": Part("weight", transposed=True)})


def _of_experts(module: Any) -> LinearForm:
    kind = _kind_of(module)
    assert kind is not None, "asked before"
    matrices = _matrices(module)
    num_experts = min(_num_experts(module, part) for part in matrices.values())
    form = kind(module, num_experts)
    parts: dict[str, Part] = {}
    # The 18,432 linears of Qwen3-30B-A3B take 9 seconds with their initialization, 5 without it.
    with no_init_weights():
        for index in range(num_experts):
            expert = nn.Module()
            for name, part in matrices.items():
                _add_linear(module, expert, parts, index, name, part)
            single = expert._modules.get("")
            form.add_module(str(index), expert if single is None else single)
    return LinearForm(form.train(module.training), parts)


def _matrices(module: Any) -> dict[str, Part]:
    """The matrices of the first expert by name; "" where there is one only."""
    if isinstance(getattr(module, "mlp", None), nn.Module) and hasattr(module.mlp, "v1"):  # DBRX
        size = (0, module.ffn_hidden_size)
        return {
            "gate_proj": Part("mlp.w1", rows=size),
            "up_proj": Part("mlp.v1", rows=size),
            "down_proj": Part("mlp.w2", rows=size, transposed=True),
        }
    if hasattr(module, "weight"):
        return {"": Part("weight", 0)}
    flipped = _is_transposed(module)
    down = Part("down_proj", 0, transposed=flipped)
    if not hasattr(module, "gate_up_proj"):
        return {"up_proj": Part("up_proj", 0, transposed=flipped), "down_proj": down}
    whole = Part("gate_up_proj", 0, transposed=flipped)
    if _kind_of(module) is LinearExperts and not takes_halves(module):
        return {"gate_up_proj": whole, "down_proj": down}
    half = module.gate_up_proj.shape[-1 if flipped else 1] // 2
    axis = "columns" if flipped else "rows"
    return {
        "gate_proj": replace(whole, **{axis: (0, half)}),
        "up_proj": replace(whole, **{axis: (half, 2 * half)}),
        "down_proj": down,
    }


def _num_experts(module: Any, part: Part) -> int:
    tensor = _tensor(module, part)
    assert part.rows is not None or part.expert is not None
    return len(tensor) if part.expert is not None else len(tensor) // part.rows[1]  # type: ignore


def _tensor(module: nn.Module, part: Part) -> Tensor:
    owner, _, key = part.tensor.rpartition(".")
    return module.get_submodule(owner).get_parameter(key)


def _add_linear(
    module: Any, expert: nn.Module, parts: dict[str, Part], index: int, name: str, first: Part
) -> None:
    """Add the linear `name` of expert `index` to `expert`, and its parameters to `parts`."""
    if first.expert is None:  # experts one below the other in a matrix
        assert first.rows is not None
        size = first.rows[1]
        part = replace(first, rows=(index * size, (index + 1) * size))
    else:
        part = replace(first, expert=index)
    weight = _tensor(module, part)
    rows, cols = part.of(weight.to("meta")).shape
    bias = getattr(module, f"{part.tensor}_bias", None)
    linear = nn.Linear(cols, rows, bias is not None, device="meta", dtype=weight.dtype)
    expert.add_module(name, linear.requires_grad_(False)) if name else None
    if not name:
        expert._modules[""] = linear.requires_grad_(False)
    prefix = ".".join(filter(None, (str(index), name)))
    parts[f"{prefix}.weight"] = part
    if bias is not None:
        along = part.columns if part.transposed else part.rows
        parts[f"{prefix}.bias"] = Part(f"{part.tensor}_bias", index, columns=along)


KNOWN: dict[str, type[LinearExperts]] = {
    "Llama4TextExperts": StackedExperts,
    "DbrxExperts": ReshapedExperts,
    "JetMoeParallelExperts": SortedExperts,
    "LongcatFlashExperts": ExpertsAndIdentity,
}
"""Classes that transformers' decorator for experts is not on, and what they compute."""


def _kind_of(module: nn.Module) -> type[LinearExperts] | None:
    """Which form an experts module has: one of its class, or the common one if the module has
    transformers' flags or a gate of its own and no parameter that is not known."""
    if (known := KNOWN.get(type(module).__name__)) is not None:
        return known if any(True for _ in module.parameters()) else None
    own = dict(module.named_parameters(recurse=False))
    names = {"gate_up_proj", "up_proj", "down_proj"} & own.keys()
    if "down_proj" not in names or len(names) != 2 or any(own[name].dim() != 3 for name in names):
        return None
    if own.keys() - names - {f"{name}_bias" for name in names}:
        return None
    gated = "gate_up_proj" in names
    if not (hasattr(module, "has_gate") or (gated and hasattr(module, "_apply_gate"))):
        return None
    takes = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters)
    return LinearExperts if len(takes) == 4 else None  # self, states, index, weights


def _is_transposed(module: Any) -> bool:
    return bool(getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts"))


def from_linear_form(model: nn.Module, originals: Mapping[str, nn.Module]) -> None:
    """Put modules of transformers in the place of their linear forms again, with the values that
    these have, in place.

    Args:
        originals: the modules, their parameters of any value or on the meta device, by full name.
    """
    for name, module in originals.items():
        form = linear_form(module)
        assert form is not None, "it had one"
        now = model.get_submodule(name)
        groups: dict[str, dict[str, Part]] = {}
        for own, part in form.parts.items():
            groups.setdefault(part.tensor, {})[own] = part
        for tensor, parts in groups.items():
            values = {own: now.get_parameter(own).data for own in parts}
            owner, _, key = tensor.rpartition(".")
            place = module.get_submodule(owner)
            whole = fuse(parts, values, place.get_parameter(key).shape)
            setattr(place, key, nn.Parameter(whole, requires_grad=False))
        for key, value in now.named_parameters(recurse=False):
            if key not in form.parts:  # a bias that both have
                setattr(module, key, value)
        model.set_submodule(name, module.train(now.training))


def fuse(parts: Mapping[str, Part], values: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """The whole tensor, of this shape, from its parts by name. What no part covers is zero."""
    first = next(iter(values.values()))
    whole = torch.zeros(shape, dtype=first.dtype, device=first.device)
    for name, value in values.items():
        parts[name].of(whole).copy_(value)
    return whole
