"""A tiny model and what transformers alone computes with it; nothing here imports vqllm."""

import inspect
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.architectures import IMAGE_TEXT, VARIANTS, save_tiny

CACHES = ("past_key_values", "cache_params", "state")
"""What outputs call what has to be passed on to the next token."""

NEW_TOKENS = 8


def make(model_type: str, folder: Path) -> dict[str, Any]:
    """Write a tiny model in bfloat16 and say what of it lies in decoder layers."""
    save_tiny(model_type, folder, dtype=torch.bfloat16)
    model = load(model_type, folder)
    layers = decoder_layers(model)
    inside = {id(p): p.numel() for m in layers.values() for p in m.parameters()}
    return {
        "layers": list(layers),
        "layer_weights": sum(inside.values()),
        "weights": sum(p.numel() for p in model.parameters()),
        "experts": sorted({line for module in layers.values() for line in experts(module)}),
    }


def load(model_type: str, folder: Path, dtype: Any = torch.float32) -> Any:
    """The model as users load it."""
    model_type = VARIANTS.get(model_type, (model_type, {}))[0]
    auto = (
        transformers.AutoModelForImageTextToText
        if model_type in IMAGE_TEXT
        else transformers.AutoModelForCausalLM
    )
    return auto.from_pretrained(folder, dtype=dtype).eval()


def decoder_layers(model: Any) -> dict[str, nn.ModuleList]:
    """The lists of decoder layers in the text part of a model, by name.

    They are the lists of as many modules as the configuration says, or else all; of several, the
    one with the most weights, and those of the same class of layers.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and not is_tower(name)
    }
    outer = {n: m for n, m in lists.items() if not any(n.startswith(f"{o}.") for o in lists)}
    wanted = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    fitting = {name: module for name, module in outer.items() if len(module) == wanted} or outer
    largest = max(fitting.values(), key=lambda m: sum(p.numel() for p in m.parameters()))
    kind = type(largest[0])
    return {name: module for name, module in outer.items() if type(module[0]) is kind}


def is_tower(name: str) -> bool:
    """Whether a module belongs to a part for images or sound, or predicts further tokens."""
    words = ("vision", "visual", "audio", "vqmodel", "image_encoder", "depth_decoder", "mtp")
    return any(word in name for word in words)


def experts(layers: nn.ModuleList) -> list[str]:
    """Classes of modules with a parameter of three dimensions, and what these are."""
    found = {
        f"{type(module).__name__}.{key} {tuple(value.shape)}"
        for module in layers.modules()
        for key, value in module.named_parameters(recurse=False)
        if value.dim() == 3 and not isinstance(module, nn.Conv1d)
    }
    return sorted(found)


def sample(length: int) -> Tensor:
    """Tokens of the tokenizer, the same for every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 384, (1, length), generator=generator)


@torch.no_grad()
def logits(model: Any, length: int = 64) -> Tensor:
    return model(input_ids=sample(length)).logits


@torch.no_grad()
def stepwise_logits(model: Any, length: int = 64) -> Tensor:
    """Logits of one token after another, each computed from the cache of those before."""
    caches: dict[str, Any] = {}
    rows = []
    for token in sample(length).unbind(1):
        output = model(input_ids=token[None], use_cache=True, **caches)
        if not any(output.get(key) is not None for key in CACHES) and not caches:
            # RecurrentGemma only fills a cache that it is given.
            if "past_key_values" not in inspect.signature(model.forward).parameters:
                raise ValueError("the output has no cache")
            caches = {"past_key_values": DynamicCache(config=model.config)}
            output = model(input_ids=token[None], use_cache=True, **caches)
        caches |= {key: output[key] for key in CACHES if output.get(key) is not None}
        rows.append(output.logits)
    return torch.cat(rows, dim=1)


@torch.no_grad()
def generated(model: Any) -> list[int]:
    """The tokens that follow the first 16 of the sample."""
    tokens = sample(16)
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    output = model.generate(tokens, do_sample=False, **length)
    return output[0, tokens.shape[1] :].tolist()


def difference(value: Tensor, wanted: Tensor) -> float:
    """The norm of the difference relative to that of what is wanted."""
    return float((value - wanted).norm() / wanted.norm())
