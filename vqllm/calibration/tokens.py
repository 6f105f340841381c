"""The token sequences of a run: those that Hessians are measured on, and a few held out."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqllm.calibration.samples import generate_samples
from vqllm.calibration.sources import load_tokens
from vqllm.errors import CalibrationError
from vqllm.loading import load_config, load_model, load_tokenizer, max_length, runs_beyond

logger = logging.getLogger(__name__)

SELF = "self"
MIN_HELD_OUT = 16
HELD_OUT_TOKENS = 8192
CACHE_BYTES = 2 << 30
"""Key-value caches of the sequences that are sampled together: 1.7 GB for 144 sequences of the demo
model. Large batches pay: 32, 64 and 128 sequences gave 273, 366 and 427 tokens per CPU second."""


@dataclass(frozen=True)
class Sequences:
    """int64 [S, L] to calibrate on, and as long ones of the same sources to evaluate on: 16, or
    more where they are short."""

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
    check_length(load_config(folder, trust_remote_code=trust_remote_code), length)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    num_held_out = max(MIN_HELD_OUT, min(HELD_OUT_TOKENS // length, num_sequences // 4))
    wanted = num_sequences + num_held_out
    files = tuple(name for name in source if name != SELF)
    num_own = wanted if not files else (wanted * source.count(SELF)) // len(source)
    parts = []
    if files:
        parts.append(load_tokens(files, tokenizer, wanted - num_own, length, seed))
    if num_own:
        dtype = torch.bfloat16 if device.type == "cpu" else "auto"
        model = load_model(
            folder, trust_remote_code=trust_remote_code, dtype=dtype, device_map=str(device)
        )
        batch_size = min(num_own, _sequences_in_cache(model.config.get_text_config(), length))
        parts.append(
            generate_samples(model, tokenizer, num_own, length, seed, batch_size=batch_size)
        )
    tokens = torch.cat(parts)
    held_out = torch.linspace(0, wanted - 1, num_held_out).round().long()
    kept = torch.ones(wanted, dtype=torch.bool)
    kept[held_out] = False
    return Sequences(tokens[kept], tokens[held_out])


def check_length(config: Any, length: int) -> None:
    """CalibrationError for sequences that the model cannot run on; a warning for longer ones than
    it was trained on."""
    longest = max_length(config)
    if longest is None or length <= longest:
        return
    message = f"sequences of {length} tokens are longer than the {longest} that this model takes"
    if not runs_beyond(config):
        raise CalibrationError(f"{message}; choose a smaller calibration.length")
    logger.warning("%s: it was not trained on such positions", message)


def _sequences_in_cache(config: Any, length: int) -> int:
    """How many sequences' caches, two bytes a value, fit into CACHE_BYTES; at least one."""
    width = config.hidden_size  # also where a model has states in place of heads
    if heads := getattr(config, "num_attention_heads", None):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        width = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    per_sequence = 2 * 2 * config.num_hidden_layers * width * length
    return max(1, CACHE_BYTES // per_sequence)
