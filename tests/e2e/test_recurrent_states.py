"""Models with a state in place of keys and values, decoded token by token: after 64 tokens the
state of the quantized model gives what that of the dense folder gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from tests.support.architectures import save_tiny
from tests.support.mixtures import sample
from tests.support.params import slow_but
from tests.support.quantized import Make, maker, quantize
from vqllm.checkpoint.dequantize import dequantize_checkpoint

FAMILIES = (
    "mamba", "qwen3_next", "mamba2", "falcon_mamba", "rwkv", "jamba", "bamba",
    "falcon_h1", "zamba2", "qwen3_5_text", "kimi_linear", "nemotron_h", "lfm2", "granitemoehybrid",
    "recurrent_gemma", "zamba", "xlstm",
)  # fmt: skip
"""A selective state space and a gated delta net first: they stand for the others by default."""


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory.mktemp("recurrent"))


@pytest.mark.parametrize("model_type", slow_but(FAMILIES[:2], FAMILIES))
def test_the_state_after_64_tokens_is_that_of_the_dense_model(model_type: str, make: Make) -> None:
    made = make(model_type)
    tokens = sample(65)
    ours, dense = (_decoded(made.load(folder), tokens) for folder in (made.output, made.dense))
    original = _decoded(made.load(made.source), tokens)
    assert float((ours - dense).norm() / dense.norm()) < 1e-4
    assert float((ours - original).norm() / original.norm()) > 1e-3  # it is quantized


def _decoded(model: Any, tokens_SL: Tensor) -> Tensor:
    """Logits of the last token, given one token at a time with what the model keeps of the others,
    as generation does."""
    options: dict[str, Any] = {"use_cache": True}
    states_in_modules = model.config.model_type == "recurrent_gemma"
    if states_in_modules:  # keys and values are in a cache, which it does not return
        options["past_key_values"] = DynamicCache(config=model.config)
    output = None
    with torch.no_grad():
        for position in range(tokens_SL.shape[1]):
            if states_in_modules:
                options["position_ids"] = torch.tensor([[position]])
            output = model(input_ids=tokens_SL[:, position : position + 1], **options)
            for key in ("past_key_values", "cache_params", "state"):
                if getattr(output, key, None) is not None:
                    options[key] = getattr(output, key)
    assert output is not None
    assert len(options) > 1, "the model keeps something"
    return output.logits[:, -1].float()


@pytest.mark.slow
def test_rwkv_runs_without_writing_into_its_weights(tmp_path: Path) -> None:
    """transformers halves them in place, and states with them, every so many layers."""
    source = save_tiny("rwkv", tmp_path / "source", rescale_every=1)
    quantize(source, tmp_path / "out")
    dequantize_checkpoint(tmp_path / "out", tmp_path / "dense", dtype="float32")
    ours, dense = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(
            sample(16)
        ).logits
        for name in ("out", "dense")
    )
    assert float((ours - dense).detach().norm() / dense.detach().norm()) < 1e-3
