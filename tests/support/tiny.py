"""Random models and a tokenizer so small that a test builds them in a fraction of a second.

Any value of the configuration can be given: `tiny_model("llama", hidden_size=37)`,
`save_tiny(tmp_path / "model", "qwen2", tie_word_embeddings=False)`.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

TEXT = (
    "The quick brown fox jumps over the lazy dog while seven wizards quietly mix 12 jars of ink. "
    "A model reads the text, counts the words and guesses the next one; it is wrong at first. "
    "In 1897 the river froze, and the children of the town walked over the ice to the mill."
)
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"

ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_neox",
    "opt",
)
"""Model types that `tiny_model` builds."""

DIFFERENT = ("gemma2", "gpt_neox", "phi3")
"""Those that differ most from each other and from llama and qwen2, which most tests take: norms
after the blocks too, blocks side by side with norms that have a mean, projections in one matrix."""


def tiny_tokenizer(add_bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 384 tokens; encodes any text and decodes it back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        show_progress=False,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


def tiny_config(arch: str, **overrides: Any) -> Any:
    """A configuration of model type `arch`; `overrides` replace any of its values.

    A hidden size that 4 heads do not divide (37) gets one head, which every model type accepts.
    """
    values: dict[str, Any] = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "initializer_range": 0.1,
    }
    if overrides.get("hidden_size", 64) % 4:
        values |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    if arch in ("gpt_neox", "opt", "falcon"):
        del values["num_key_value_heads"], values["head_dim"]
    values |= overrides
    if arch == "opt":
        values.setdefault("word_embed_proj_dim", values["hidden_size"])
        values["ffn_dim"] = values.pop("intermediate_size")
    return transformers.AutoConfig.for_model(arch, **values)


def tiny_model(
    arch: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A random causal language model in evaluation mode.

    Biases and norms, which transformers starts at 0 and 1, are random too, so that losing one
    changes the output.

    Args:
        arch: one of `ARCHITECTURES`.
        overrides: values of the configuration, such as `hidden_size=344` or `num_hidden_layers=4`.
    """
    config = tiny_config(arch, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def save_tiny(folder: Path, arch: str = "llama", **overrides: Any) -> Path:
    """Write `tiny_model(arch, **overrides)` and its tokenizer as an ordinary folder."""
    tiny_model(arch, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
