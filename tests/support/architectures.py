"""A random model of a few layers for every model type that the installed transformers has.

`tiny_config("mixtral")` shrinks the default configuration of the type: sizes that have a usual name
get a small value, each kind of layer comes once, sub-configurations are shrunk likewise. The values
are in `architectures.yaml`, with those that single classes need.
"""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from tests.support.tiny import tiny_tokenizer

_VALUES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
SIZES, CLASSES = _VALUES["sizes"], _VALUES["classes"]
NUMBERS_OF_LAYERS, NOT_MADE = _VALUES["numbers_of_layers"], _VALUES["not_made"]
VARIANTS = {name: (entry["type"], entry["values"]) for name, entry in _VALUES["variants"].items()}

VOCABULARY = SIZES["vocab_size"]

MAX_LAYERS = 4

FIRST_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
TOKEN_ENDINGS = ("_token_id", "_token_index")

NEEDED_BY_DEFAULT = ("text_config",)
"""What a class without defaults must be given before its defaults can be read."""

CAUSAL = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
IMAGE_TEXT = dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def model_types() -> list[str]:
    """Every type of which a tiny model can be made: causal language models, then those that take
    images too, then variants."""
    every = [*CAUSAL, *(name for name in IMAGE_TEXT if name not in CAUSAL), *VARIANTS]
    return [name for name in every if name not in NOT_MADE]


def model_class(model_type: str) -> type[PreTrainedModel]:
    """The class that a folder of this type names; where there are two, that with images."""
    model_type, _ = VARIANTS.get(model_type, (model_type, {}))
    name = IMAGE_TEXT.get(model_type) or CAUSAL[model_type]
    return getattr(transformers, name)


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """A configuration of this type with 2 to 4 layers and about 10⁵ weights.

    Args:
        model_type: one of `model_types()`.
        overrides: values that replace those chosen here.
    """
    model_type, variant = VARIANTS.get(model_type, (model_type, {}))
    return _shrink(CONFIG_MAPPING[model_type], variant | overrides)


def tiny_architecture(model_type: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model of this type in evaluation mode.

    Biases and norms are random too, as in `tests.support.tiny.tiny_model`.
    """
    config = tiny_config(model_type, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = model_class(model_type)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def save_tiny(
    model_type: str, folder: Path, *, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """Write a tiny model of this type and its tokenizer as an ordinary folder.

    Tensors that transformers keeps in float32 stay so whatever `dtype` is.
    """
    tiny_architecture(model_type, **overrides).save_pretrained(folder)
    if dtype != torch.float32:
        model = model_class(model_type).from_pretrained(folder, dtype=dtype)
        model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _shrink(cls: Any, overrides: dict[str, Any]) -> PretrainedConfig:
    """A small configuration of a class; an override of a sub-configuration is a dictionary."""
    # A copy: configurations change the dictionaries that they are given.
    exceptions = copy.deepcopy(CLASSES.get(cls.__name__, {}))
    defaults = _defaults(cls, exceptions)
    values = {name: SIZES[name] for name, value in defaults.items() if _is_size(name, value)}
    if "qk_rope_head_dim" in defaults:  # latent attention has as many keys as queries
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
    values |= _token_ids(defaults)
    values |= _layers(cls, defaults, exceptions)
    values |= exceptions
    for name, value in defaults.items():
        if isinstance(value, PretrainedConfig):
            values[name] = _shrink(type(value), values.get(name, {}) | overrides.pop(name, {}))
    return cls(**(values | overrides))


def _defaults(cls: Any, exceptions: dict[str, Any]) -> dict[str, Any]:
    """The values of the default configuration, under the names that the class takes."""
    names = {field.name for field in dataclasses.fields(cls)} | set(cls.sub_configs)
    needed = {name: exceptions[name] for name in NEEDED_BY_DEFAULT if name in exceptions}
    written = vars(cls(**needed))
    stored = {name: cls.attribute_map.get(name, name) for name in sorted(names)}
    return {name: written[key] for name, key in stored.items() if key in written}


def _is_size(name: str, value: Any) -> bool:
    return name in SIZES and value is not None and type(value) is type(SIZES[name])


def _token_ids(defaults: dict[str, Any]) -> dict[str, int]:
    """Begin, end and padding as the tokenizer has them; others at the end of the vocabulary."""
    ids, last = {}, VOCABULARY
    for name in sorted(defaults):
        if name in FIRST_TOKENS:
            ids[name] = FIRST_TOKENS[name]
        elif name.endswith(TOKEN_ENDINGS) and isinstance(defaults[name], int):
            last -= 1
            ids[name] = last
    return ids


def _layers(cls: Any, defaults: dict[str, Any], exceptions: dict[str, Any]) -> dict[str, Any]:
    """The number of layers, and the lists with an entry for each, so that each kind comes once."""
    counts = [name for name in NUMBERS_OF_LAYERS if isinstance(defaults.get(name), int)]
    if not counts or counts[0] in exceptions:
        return {}
    number = defaults[counts[0]]
    lists = {
        name: value
        for name, value in defaults.items()
        if isinstance(value, list | tuple) and len(value) == number and name not in exceptions
    }
    kinds = [repr(kind) for kind in zip(*lists.values(), strict=True)]
    chosen = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:MAX_LAYERS]
    if len(chosen) < 2:
        chosen = chosen * 2 or [0, 0]
    values: dict[str, Any] = {
        name: [value[index] for index in chosen] for name, value in lists.items()
    }
    return values | dict.fromkeys(counts, len(chosen))
