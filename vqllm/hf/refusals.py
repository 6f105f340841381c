"""What a folder holds besides, or in place of, a model for this package.

Everything here reads JSON and the names of files: it takes no time, and comes before all else.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vqllm.core import json_text
from vqllm.errors import ModelError

DECODERS = (
    "Only decoder-only language models are quantized and measured (GPT, Llama, Qwen and the like): "
    "pass one of these."
)

ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's file: transformers applies the adapter that it names wherever PEFT is installed."""

VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
    "spiece.model", "sentencepiece.bpe.model", "*.tiktoken", "tekken.json",
)  # fmt: skip
"""Files of which a folder with a tokenizer has one at least. tokenizer_config.json is enough where
tokens are bytes."""
SAVE_TOKENIZER = (
    "Save the model's tokenizer into the folder, complete: "
    "AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER)."
)


def refuse_adapter(folder: Path) -> None:
    """Raise ModelError for an adapter in the folder (LoRA or another of PEFT).

    Whether transformers applies it depends on whether PEFT is installed, so what a folder with an
    adapter would be quantized or measured as does too.
    """
    files = adapter_files(folder)
    if not files:
        return
    found = f"a {_adapter_kind(folder)} adapter ({', '.join(files)})"
    weights = {p.name for kind in ("*.safetensors", "pytorch_model*") for p in folder.glob(kind)}
    if not weights - set(files) or not (folder / "config.json").is_file():
        base = _adapter_json(folder).get("base_model_name_or_path") or "another model"
        raise ModelError(
            f"{folder} holds only {found} of {base}: "
            "merge it into that model first (PeftModel.from_pretrained, merge_and_unload, "
            "save_pretrained), and pass the folder that this writes."
        )
    raise ModelError(
        f"{folder} holds {found} beside the model: merge it into the model first "
        "(merge_and_unload, then save_pretrained to a new folder), or remove its files to use the "
        "model without it."
    )


def adapter_files(folder: Path) -> list[str]:
    """Names of the files of an adapter in a folder."""
    return sorted(path.name for path in folder.iterdir() if is_adapter_file(path.name))


def is_adapter_file(name: str) -> bool:
    """Whether PEFT calls a file of an adapter so."""
    return name == ADAPTER_CONFIG or name.startswith("adapter_model.")


def _adapter_kind(folder: Path) -> str:
    kind = str(_adapter_json(folder).get("peft_type") or "LoRA")
    return "LoRA" if kind == "LORA" else kind


def _adapter_json(folder: Path) -> Mapping[str, Any]:
    try:
        values = json_text.read(folder / ADAPTER_CONFIG)
    except (OSError, ValueError):
        return {}  # it only adds names to a message
    return values if isinstance(values, dict) else {}


def has_tokenizer(folder: Path) -> bool:
    """Whether a file of a tokenizer is in the folder."""
    return any(path.is_file() for name in VOCABULARIES for path in folder.glob(name))


def refuse_no_tokenizer(folder: Path) -> None:
    """Raise ModelError where there is no tokenizer."""
    if not has_tokenizer(folder):
        raise ModelError(
            f"{folder} has no tokenizer (tokenizer.json, tokenizer.model or the like), which it "
            f"takes to read text, and to sample from the model too. {SAVE_TOKENIZER}"
        )


def refuse_empty_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Raise ModelError for a tokenizer that knows special tokens only, so that every text is
    nothing or unknown to it."""
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(
            f"{folder} has no vocabulary: transformers makes a {type(tokenizer).__name__} with "
            f"{len(tokenizer)} special tokens and no other from its files. {SAVE_TOKENIZER}"
        )


def refuse_other_kinds(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError for a model that does not continue a text token by token.

    transformers would load some of them as a causal language model without a word: a BERT, whose
    tokens see those that follow, or the decoder alone of a BART.

    Args:
        config: of the folder's config.json.
    """
    if _value(config, "attn_type") == "bi":
        raise ModelError(
            f"{folder} holds {_described(config)}: a permutation language model (attn_type 'bi'), "
            f"whose tokens see those that follow them unless a mask says otherwise. {DECODERS}"
        )
    if _is_causal(config):
        return
    if any(_is_encoder_decoder(part) for part in _with_text_model(config)):
        raise ModelError(
            f"{folder} holds {_described(config)}: an encoder-decoder model, whose decoder reads "
            f"what an encoder makes of another input. {DECODERS}"
        )
    if _is_encoder(config):
        raise ModelError(
            f"{folder} holds {_described(config)}: an encoder, as for masked language modelling, "
            f"whose tokens see those that follow them. {DECODERS}"
        )


def _is_causal(config: Mapping[str, Any]) -> bool:
    """Whether one of the classes that the model was saved from is a causal language model, and for
    nothing else at the same time (XLM has one class for both)."""
    from transformers.models.auto import modeling_auto as auto

    causal = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    masked = set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
    return any(
        name in causal or name.endswith(("ForCausalLM", "LMHeadModel"))
        for name in _classes(config)
        if name not in masked
    )


def _is_encoder_decoder(config: Mapping[str, Any]) -> bool:
    """Whether the configuration says so, or its class does by default."""
    return bool(_value(config, "is_encoder_decoder"))


def _value(config: Mapping[str, Any], key: str) -> Any:
    """A value of a configuration, or the default of its class."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    value = config.get(key)
    if value is None and config.get("model_type") in CONFIG_MAPPING:
        value = getattr(CONFIG_MAPPING[config["model_type"]], key, None)
    return value


def _is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether it is a masked language model, or of a type that is one unless it says otherwise."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    classes: Any = MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if any(name.endswith("ForMaskedLM") for name in _classes(config)):
        return True
    # Of encoder-decoder models the list has the whole: one that says that it is none is a decoder.
    masked = classes.get(config.get("model_type"), "ForConditionalGeneration")
    decoder = config.get("is_decoder") or config.get("causal")
    return not masked.endswith("ForConditionalGeneration") and not decoder


def _with_text_model(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A configuration, and that of the language model in it, where it has several."""
    yield config
    text = config.get("text_config")
    if isinstance(text, Mapping):
        yield text


def _described(config: Mapping[str, Any]) -> str:
    names = ", ".join(_classes(config))
    return names or f"a model of type {config.get('model_type')!r}"


def _classes(config: Mapping[str, Any]) -> list[str]:
    """Names of the classes that the model was saved from."""
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
