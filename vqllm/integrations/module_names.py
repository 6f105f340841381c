"""Which modules of a loaded model a checkpoint's quantized matrices are for.

A checkpoint names them as its files do. transformers' rules for the class that is loaded say what
they are called there: the text tower of a multimodal folder has other names by itself, and a model
without a head has none of its tensors, as with any dense folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

from vqllm.checkpoint.format import QuantizationConfig
from vqllm.errors import CheckpointError
from vqllm.hf.classes import is_own_class
from vqllm.hf.conversions import Renaming
from vqllm.hf.linear_form import has_linear_form, is_fused, to_linear_form
from vqllm.hf.next_tokens import further_layer
from vqllm_kernels.linear import LinearSpec


@dataclass(frozen=True)
class Found:
    """What of a checkpoint a model has a place for, by full names in the model."""

    specs: Mapping[str, LinearSpec]
    tied: dict[str, str]
    gone: frozenset[str]
    """tensors of transformers' own model whose parts are linears now"""
    own: frozenset[str]
    """modules whose tensors have names of their own in the files: all that are packed, and all
    linears in the place of tensors that are gone"""
    originals: Mapping[str, nn.Module]
    """the modules that are or will be in linear form, as they were"""


def found_in(model: Any, quantization: QuantizationConfig) -> Found:
    """Find the modules of `model`, on the meta device, whose experts become linears if those of
    the checkpoint are.

    Raises:
        CheckpointError: the class that config.json names has no such module.
    """
    specs = quantization.linears()
    gone: frozenset[str] = frozenset()
    before: dict[str, nn.Module] = {}
    apart: set[str] = set()
    if quantization.linear_form:
        before = {n: m for n, m in model.named_modules() if has_linear_form(m)}
        parts = to_linear_form(model, only_experts=True)
        gone = frozenset(part.tensor for part in parts.values())
        apart = {name.rpartition(".")[0] for name in parts}
    rename = Renaming(model, get_model_conversion_mapping(model))
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[str, str] = {}
    for name, spec in specs.items():
        found = rename.module(name, next(iter(spec.layout())), modules)
        if found is not None:
            names[name] = found
        elif _must_have(model, name, rename.name(name, next(iter(spec.layout())))):
            raise _no_module(model, name, spec)
    if not names:
        raise _no_module(model, *next(iter(specs.items())))
    tied: dict[str, str] = {}
    for name, source in quantization.tied.items():
        found = rename.module(name, "weight", modules)
        if found is not None and source in names:
            tied[found] = names[source]
    return Found(
        {names[name]: spec for name, spec in specs.items() if name in names},
        tied,
        gone,
        frozenset({*names.values(), *tied, *apart}),
        {n: m for n, m in before.items() if is_fused(m) or n in names.values()},
    )


def _no_module(model: Any, name: str, spec: LinearSpec) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint says that {name} is quantized, {spec.rows} x {spec.cols}, but "
        f"{type(model).__name__} has no module of that name. config.json and the weights "
        "must be those of one checkpoint."
    )


def _must_have(model: nn.Module, *names: str) -> bool:
    """Whether a missing module, by what it may be called, means damage: the model is of the class
    that the folder is of, and was not asked to have fewer layers."""
    return is_own_class(model) and not any(further_layer(model, f"{name}.") for name in names)
