"""Model types whose experts, or GPT-2's projections, are not linears in transformers, and what a
tiny model computes."""

from typing import Any

import torch
from torch import Tensor

from tests.support.architectures import tiny_architecture

FORMS = (
    "qwen3_moe",  # gate and up one behind the other
    "gpt_oss",  # interleaved, transposed, with biases
    "nemotron_h",  # no gate
    "muse_spark",  # a norm behind each expert
    "aria_text",  # transposed halves
    "llama4_text",  # experts one behind the other
    "dbrx",  # experts one below the other in a matrix
    "jetmoe",  # tokens sorted by expert
    "longcat_flash",  # experts that give back their input
    "gpt2",  # Conv1D
)
"""One type of every form that experts and projections have."""

OTHERS = (
    "afmoe",
    "axk1",
    "axk2",
    "bailing_hybrid",
    "beam",
    "cohere2_moe",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "dots1",
    "dots3_note_text",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "gemma4_text with experts",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "hy_v4",
    "inkling2_text",
    "inkling_text",
    "jamba",
    "kimi_linear",
    "kolibri1",
    "laguna",
    "lfm2_moe",
    "mellum",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl_text",
    "mistral4",
    "mixtral",
    "olmoe",
    "openai-gpt",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_next",
    "qwen4_exp_text",
    "solar_open",
    "zaya",
)
"""Further ones that read text."""

MULTIMODAL = (
    "aria",
    "deepseek_ocr2",
    "dots3_note",
    "ernie4_5_vl_moe",
    "glm4v_moe",
    "glm5_next",
    "inkling2",
    "inkling_mm_model",
    "kimi_k25",
    "llama4",
    "minimax_m3_vl",
    "mistral_large4",
    "nemotron_h_omni",
    "qwen3_5_moe",
    "qwen3_omni_moe_thinker",
    "qwen3_vl_moe",
    "qwen4_exp",
    "step3p7",
    "unlimited_ocr",
)
"""And those with towers for images or sound."""


def sample(length: int = 48, sequences: int = 1) -> Tensor:
    """Tokens of the tiny tokenizer, the same for every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 384, (sequences, length), generator=generator)


@torch.no_grad()
def logits(model: Any, length: int = 48) -> Tensor:
    return model(input_ids=sample(length)).logits


def eager(model_type: str, **overrides: Any) -> Any:
    """A tiny model whose experts run one after another, as transformers defines them."""
    model: Any = tiny_architecture(model_type, **overrides)
    model.set_experts_implementation("eager")
    return model
