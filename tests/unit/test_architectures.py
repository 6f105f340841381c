"""Tiny models of transformers' model types."""

import pytest
import torch

from tests.support.architectures import (
    CAUSAL,
    IMAGE_TEXT,
    NOT_MADE,
    model_class,
    model_types,
    save_tiny,
    tiny_config,
)


def test_every_type_is_made_or_said_not_to_be() -> None:
    assert set(NOT_MADE) <= {*CAUSAL, *IMAGE_TEXT}
    assert {*model_types(), *NOT_MADE} >= {*CAUSAL, *IMAGE_TEXT}


@pytest.mark.parametrize("model_type", ["mixtral", "jamba", "gpt_oss", "qwen3_5", "llama4"])
def test_a_tiny_model_is_saved_and_runs(model_type: str, tmp_path) -> None:
    save_tiny(model_type, tmp_path, dtype=torch.bfloat16)
    model = model_class(model_type).from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    logits = model(input_ids=torch.arange(3, 20)[None]).logits
    assert logits.isfinite().all()


def test_each_kind_of_layer_comes_once() -> None:
    assert tiny_config("qwen3_next").layer_types == ["linear_attention", "full_attention"]
    assert tiny_config("gemma3").get_text_config().layer_types == [
        "sliding_attention",
        "full_attention",
    ]


def test_values_can_be_given() -> None:
    config = tiny_config("gemma3", text_config={"hidden_size": 32}, image_token_index=390)
    assert (config.text_config.hidden_size, config.image_token_index) == (32, 390)
