"""Stored tensors that are not those of the model: refused, with what is known of the cause."""

import contextlib
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vqllm.core.listing import listed
from vqllm.errors import ModelError
from vqllm.hf import next_tokens, wrapped_names

LOOKS = {
    r"^tok_embeddings\.|^layers\.\d+\.attention\.w[qkvo]\.": "Meta's or Mistral's own format",
    r"^blk\.\d+\.": "GGUF",
    r"\.self_attention\.linear_(qkv|proj)\.": "Megatron",
    r"(^|\.)h\.\d+\.attn\.c_attn\.": "GPT-2",
    r"\.self_attention\.query_key_value\.": "Falcon or BLOOM",
    r"(^|\.)gpt_neox\.": "GPT-NeoX",
    r"(^|\.)decoder\.layers\.\d+\.self_attn\.": "OPT",
    r"(^|\.)transformer\.blocks\.\d+\.": "MPT",
    r"\.layers\.\d+\.mixer\.": "Mamba",
    r"\.mlp\.experts\.|\.block_sparse_moe\.": "a mixture of experts",
    r"\.self_attn\.qkv_proj\.": "Phi-3",
    r"\.self_attn\.q_proj\.": "Llama and its relatives",
    r"\.attention\.self\.query\.": "BERT",
}
"""Names that give an architecture or a format away."""


def refuse_wrong_tensors(folder: Path, model: Any, info: Mapping[str, Any]) -> None:
    """Raise ModelError for missing tensors, other shapes, or weights of layers beyond the model's.

    Other unexpected tensors are ignored, as transformers does, and so are further layers that are
    known to predict more tokens.

    Args:
        info: what transformers returns as loading info.
    """
    unexpected = sorted(info["unexpected_keys"])
    if missing := _without_other_names(model, info["missing_keys"]):
        once = missing & dict(model.named_parameters()).keys()  # tied ones are stored once
        wrapper = wrapped_names.explanation(folder, once or missing, unexpected)
        cause = wrapper or _cause(model, missing, unexpected)
        raise ModelError(
            f"{folder} lacks {len(missing)} of the tensors of a {type(model).__name__}: "
            f"{listed(missing)}. {cause}"
        )
    if wrong := info["mismatched_keys"]:
        shapes = [f"{name} is {tuple(has)}, not {tuple(needs)}" for name, has, needs in wrong]
        raise ModelError(
            f"{folder}: {len(wrong)} of the tensors have another shape than config.json asks for: "
            f"{listed(shapes)}. It is that of another model, or was changed: put back the one that "
            "was written with these weights."
        )
    if beyond := next_tokens.surplus(model, unexpected)[1]:
        raise ModelError(
            f"{folder} has weights of more layers than its config.json names, for example "
            f"{listed(beyond)}. Put back the config.json that was written with these weights, or "
            "write the model with fewer layers by save_pretrained."
        )


def _cause(model: Any, missing: Collection[str], unexpected: Collection[str]) -> str:
    """What is known of why tensors are missing, and what to do."""
    packed = [name for name in unexpected if _module(name) in set(map(_module, missing))]
    if packed:
        return (
            f"In their place are others of the same modules, {listed(packed)}: packed weights, "
            "while config.json has no quantization_config that says how they are packed. Put back "
            "the config.json that was written with them."
        )
    if unexpected:
        return (
            f"It has {len(unexpected)} others, {listed(unexpected)}{_look(unexpected)}, while "
            f"config.json is that of a {model.config.model_type!r}. Put back the config.json that "
            "was written with these weights, or convert them to the names of this model."
        )
    if missing == {_head(model)}:
        return (
            "config.json says that the head is not the embedding (tie_word_embeddings: false). If "
            "it is, set that to true; if the model has no head, `architectures` must name a class "
            "without one."
        )
    if layers := _layers_of(model, missing):
        has, needs = layers
        return (
            f"config.json names {needs} layers, and the files hold {has}: put back the config.json "
            "that was written with these weights, or fetch the files that are missing."
        )
    return "They are there under no other name: the files are incomplete. Get a complete copy."


def _look(names: Iterable[str]) -> str:
    """Of which architecture or format the names look like."""
    names = list(names)
    for pattern, what in LOOKS.items():
        if any(re.search(pattern, name) for name in names):
            return f", which look like those of {what}"
    return ""


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _head(model: Any) -> str | None:
    """The name of the weight of the model's head, if it has one."""
    with contextlib.suppress(AttributeError, NotImplementedError):
        head = model.get_output_embeddings()
        for name, module in model.named_modules():
            if module is head:
                return f"{name}.weight"
    return None


def _layers_of(model: nn.Module, missing: Collection[str]) -> tuple[int, int] | None:
    """If what is missing is all of the last layers and nothing else: how many layers there are, and
    how many there should be."""
    names = set(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and all(m.startswith(f"{name}.") for m in missing):
            first = min(int(m[len(name) + 1 :].partition(".")[0]) for m in missing)
            gone = tuple(f"{name}.{i}." for i in range(first, len(module)))
            if {n for n in names if n.startswith(gone)} == set(missing):
                return first, len(module)
    return None


def _without_other_names(model: nn.Module, missing: Collection[str]) -> set[str]:
    """`missing` without names of tensors that were loaded under another name: a module that several
    layers share is stored once."""
    loaded = {
        id(tensor)
        for tensors in (model.named_parameters, model.named_buffers)
        for name, tensor in tensors(remove_duplicate=False)
        if name not in missing
    }
    tensors = dict(model.named_parameters(remove_duplicate=False))
    return {name for name in missing if id(tensors.get(name)) not in loaded}
