"""Which class of transformers a folder's model is loaded with."""

from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto as names

_CHOICES: tuple[tuple[Any, Any], ...] = (
    (AutoModelForCausalLM, names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (AutoModelForImageTextToText, names.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    (
        AutoModelForSequenceClassification,
        names.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    (AutoModelForTokenClassification, names.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    (AutoModel, names.MODEL_MAPPING_NAMES),
)
"""The classes that are tried, and the model classes that each of them stands for by model type."""


def auto_class(config: Any) -> Any:
    """The `AutoModel...` class for the model that `config` says its folder holds.

    That is the first whose class for the model type is the config's own `architectures`: a model
    with a head over tokens, the text and vision towers of a multimodal folder, a classifier, or a
    model without a head. A folder that says nothing, or something that transformers does not have,
    is a causal language model.
    """
    own = (getattr(config, "architectures", None) or [None])[0]
    causal, multimodal = (by_type for _, by_type in _CHOICES[:2])
    if config.model_type not in {*causal, *multimodal}:
        return AutoModelForCausalLM
    for auto, by_type in _CHOICES:
        known = by_type.get(config.model_type)
        if own is not None and own in (known if isinstance(known, (tuple, list)) else [known]):
            return auto
    if own is None and config.model_type in multimodal and config.model_type not in causal:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def predicts_tokens(config: Any) -> bool:
    """Whether the model gives logits of the next token at every position."""
    return auto_class(config) in (AutoModelForCausalLM, AutoModelForImageTextToText)


def is_own_class(model: Any) -> bool:
    """Whether a model is of the class that its folder's config.json names."""
    return type(model).__name__ in (getattr(model.config, "architectures", None) or ())
