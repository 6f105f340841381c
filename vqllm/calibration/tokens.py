"""The token sequences of a run: those that Hessians are measured on, and a few held out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from vqllm.calibration.samples import generate_samples
from vqllm.calibration.sources import load_tokens

SELF = "self"
NUM_HELD_OUT = 16
CACHE_BYTES = 2 << 30
"""Key-value caches of the sequences that are sampled together: 1.7 GB for 144 sequences of the demo
model. Large batches pay: 32, 64 and 128 sequences gave 273, 366 and 427 tokens per CPU second."""


@dataclass(frozen=True)
class Sequences:
    """int64 [S, L] to calibrate on and int64 [16, L] of the same sources to evaluate on."""

    calibration: Tensor
    held_out: Tensor


def calibration_sequences(
    folder: Path,
    source: tuple[str, ...],
    num_sequences: int,
    length: int,
    seed: int,
    device: torch.device,
    trust_remote_code: bool,
) -> Sequences:
    """Read or generate the sequences; `self` and files share the number equally when mixed."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    wanted = num_sequences + NUM_HELD_OUT
    files = tuple(name for name in source if name != SELF)
    num_own = wanted if not files else (wanted * source.count(SELF)) // len(source)
    parts = []
    if files:
        parts.append(load_tokens(files, tokenizer, wanted - num_own, length, seed))
    if num_own:
        dtype = torch.bfloat16 if device.type == "cpu" else "auto"
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map=str(device), trust_remote_code=trust_remote_code
        )
        batch_size = min(num_own, _sequences_in_cache(model.config.get_text_config(), length))
        parts.append(
            generate_samples(model, tokenizer, num_own, length, seed, batch_size=batch_size)
        )
    tokens = torch.cat(parts)
    held_out = torch.linspace(0, wanted - 1, NUM_HELD_OUT).round().long()
    kept = torch.ones(wanted, dtype=torch.bool)
    kept[held_out] = False
    return Sequences(tokens[kept], tokens[held_out])


def _sequences_in_cache(config: Any, length: int) -> int:
    """How many sequences' caches, two bytes a value, fit into CACHE_BYTES; at least one."""
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    per_sequence = 2 * 2 * config.num_hidden_layers * num_heads * head_dim * length
    return max(1, CACHE_BYTES // per_sequence)
