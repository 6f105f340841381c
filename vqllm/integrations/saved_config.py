"""The `quantization_config` that a loaded model is saved with: that of its modules as they are now.

A model can be edited after it was loaded: layers removed or doubled, a linear made dense, a head
exchanged. What is written must load again as the model that was saved, so the configuration is made
of its packed modules, and where they or config.json have changed, an empty model is made of both
and compared. As long as nothing has changed, it is the loaded configuration, to the byte.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from vqllm.checkpoint.format import QuantizationConfig
from vqllm.core.listing import listed
from vqllm.errors import CheckpointError
from vqllm.hf.conversions import Renaming
from vqllm.hf.linears import is_linear
from vqllm.integrations.module_names import found_in
from vqllm.runtime.packed import PackedModule
from vqllm.runtime.replace import replace_modules

SETTINGS = ("_name_or_path", "architectures", "dtype", "quantization_config", "use_cache")
"""Keys of config.json that say nothing about the modules of a model."""

MADE_DENSE = "dense when the model was saved, quantized before"

SHOWN = 5
"""Names that a message lists."""


def structure(config: Any) -> dict[str, Any]:
    """What config.json says about the modules of a model."""
    return {key: value for key, value in config.to_dict().items() if key not in SETTINGS}


def tied_modules(model: nn.Module, before: Mapping[str, str]) -> dict[str, str]:
    """Packed modules that use the tensors of another one, as before and still, by full name.

    Args:
        before: those that did when the model was loaded.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    tied = {}
    for name, source in before.items():
        own, other = modules.get(name), modules.get(source)
        if isinstance(own, PackedModule) and isinstance(other, PackedModule):
            # Offloaded tensors have a stand-in for each module.
            offloaded = own.device.type == other.device.type == "meta"
            same = all(map(_is, own.packed.values(), other.packed.values()))
            if own.spec == other.spec and (same or offloaded):
                tied[name] = source
    return tied


def _is(own: Tensor, other: Tensor) -> bool:
    return own is other


def config_as_it_is(
    model: Any, loaded: QuantizationConfig, tied: Mapping[str, str]
) -> QuantizationConfig:
    """The configuration of a model's packed modules.

    Args:
        model: it has at least one.
        loaded: its configuration when it was loaded, or when it was saved last; returned itself
            if it is still right.
        tied: modules that use the tensors of another one, by full name.
    """
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedModule)}
    names = _names_in_files(model, packed)
    specs = {names[name]: module.spec for name, module in packed.items() if name not in tied}
    ties = {names[name]: names[source] for name, source in tied.items()}
    if specs == loaded.linears() and ties == loaded.tied:
        return loaded
    outside = {
        name
        for name in specs
        if (name in loaded.outside_layers if name in loaded.modules else _is_outside(name))
    }
    built = QuantizationConfig.build(
        specs, outside_layers=outside, tied=ties, linear_form=loaded.linear_form
    )
    extra = dict(loaded.extra)
    if extra.get("not_quantized") or loaded.modules.keys() - specs.keys() - ties.keys():
        extra["not_quantized"] = _not_quantized(model, loaded, {*specs, *ties})
    return replace(built, extra=extra)


def _names_in_files(model: Any, packed: Mapping[str, PackedModule]) -> dict[str, str]:
    """The name in the files of each module, as transformers will write it."""
    marks: dict[str, tuple[str, str, Tensor]] = {}
    for name, module in packed.items():
        key = next(iter(module.packed))
        marks[f"{name}.{key}"] = name, key, torch.empty(0)
    written = revert_weight_conversion(model, {key: mark for key, (_, _, mark) in marks.items()})
    by_mark = {id(mark): key for key, mark in written.items()}
    return {
        name: by_mark.get(id(mark), f"{name}.{key}").removesuffix(f".{key}")
        for name, key, mark in marks.values()
    }


def _is_outside(name: str) -> bool:
    """Whether a module is in no list of layers."""
    return not any(part.isdecimal() for part in name.split("."))


def _not_quantized(
    model: Any, loaded: QuantizationConfig, quantized: Iterable[str]
) -> dict[str, str]:
    """Reasons by module, for modules that are there."""
    renaming = Renaming(model, get_model_conversion_mapping(model))
    modules = dict(model.named_modules(remove_duplicate=False))
    before = dict.fromkeys([*loaded.modules, *loaded.tied], MADE_DENSE)
    reasons = {**(loaded.extra.get("not_quantized") or {}), **before}
    quantized = set(quantized)
    return {
        name: reason
        for name, reason in reasons.items()
        if name not in quantized and renaming.module(name, "weight", modules) is not None
    }


def check_loads_again(model: Any, quantization: QuantizationConfig) -> None:
    """Raise CheckpointError unless this configuration and the model's config.json make a model with
    the same modules and tensors, into which every saved tensor fits."""
    what = f"this {type(model).__name__} was changed and would not load again as it is"
    advice = (
        "Nothing was saved. Change model.config together with the modules (num_hidden_layers, "
        "vocab_size), or save dense weights: model.dequantize()."
    )
    try:
        with torch.device("meta"):
            empty = type(model)(copy.deepcopy(model.config))
            found = found_in(empty, quantization)
            replace_modules(empty, found.specs, found.tied)
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error} {advice}") from error
    ours, theirs = _shapes(model), _shapes(empty)
    missing, extra = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    other = sorted(name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name])
    problems = [
        f"{len(names)} {how} ({listed(names, SHOWN)})"
        for names, how in (
            (missing, "tensors that it lacks would be random"),
            (extra, "tensors have no place in what config.json describes"),
            (other, "tensors have another shape than config.json describes"),
            (_of_other_classes(model, empty), "modules are not of the class that would be loaded"),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{what}: {'; '.join(problems)}. {advice}")


def _of_other_classes(model: nn.Module, empty: nn.Module) -> list[str]:
    """Dense modules that compute something else than those that would be loaded in their places: a
    linear for a Conv1D, whose weight is transposed, an embedding for one that scales its rows."""
    theirs = dict(empty.named_modules())
    found = []
    for name, own in model.named_modules():
        other = theirs.get(name)
        if other is None or next(own.parameters(recurse=False), None) is None:
            continue
        alike = type(own).forward is type(other).forward or (is_linear(own) and is_linear(other))
        if not alike:
            found.append(f"{name}: {type(own).__name__}, not {type(other).__name__}")
    return found


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
