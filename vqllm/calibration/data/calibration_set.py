"""The token sequences of a run: those for the Hessians, and a few held out."""

import logging
from pathlib import Path
from typing import Any

import torch

from vqllm.calibration.data.cut_sequences import Sequences, load_tokens
from vqllm.calibration.data.self_samples import generate_samples
from vqllm.checkpoint.stored import tensors_to_load
from vqllm.errors import CalibrationError
from vqllm.hf.loading import load_config, load_model, load_tokenizer, max_length, runs_beyond

logger = logging.getLogger(__name__)

SELF = "self"
MIN_HELD_OUT = 16
HELD_OUT_TOKENS = 8192
CACHE_BYTES = 2 << 30
"""Key-value caches of the sequences that are sampled together: 1.7 GB for 144 sequences of the demo
model. Large batches pay: 32, 64 and 128 sequences gave 273, 366 and 427 tokens per CPU second."""


def held_out_of(num_sequences: int, length: int) -> int:
    """How many sequences are held out beside so many that are calibrated on."""
    return max(MIN_HELD_OUT, min(HELD_OUT_TOKENS // length, num_sequences // 4))


def calibration_sequences(
    folder: Path,
    source: tuple[str, ...],
    num_sequences: int,
    length: int,
    seed: int,
    device: torch.device,
    trust_remote_code: bool,
) -> Sequences:
    """Read or generate the sequences; `self` and files share the number equally when mixed.

    16 sequences are held out, or more where they are short; fewer of texts that have no more.
    """
    check_length(load_config(folder, trust_remote_code=trust_remote_code), length)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    # `self` and each file name of `source` have the same share; "own" are samples of the model.
    num_held_out = held_out_of(num_sequences, length)
    files = tuple(name for name in source if name != SELF)
    num_own, num_own_held_out = (
        num if not files else (num * source.count(SELF)) // len(source)
        for num in (num_sequences, num_held_out)
    )
    parts = []
    if files:
        num_read, num_held_out = num_sequences - num_own, num_held_out - num_own_held_out
        parts.append(load_tokens(files, tokenizer, num_read, length, seed, num_held_out))
    if num_own + num_own_held_out:
        dtype = torch.bfloat16 if device.type == "cpu" else "auto"
        model = load_model(
            folder,
            trust_remote_code=trust_remote_code,
            tensors=tensors_to_load(folder),
            dtype=dtype,
            device_map=str(device),
        )
        # As many sequences at once as their caches fit; the samples do not depend on it.
        most = sequences_in_cache(model.config.get_text_config(), length)
        tokens_SL = generate_samples(
            model,
            tokenizer,
            num_own,
            length,
            seed,
            num_held_out=num_own_held_out,
            batch_size=min(num_own + num_own_held_out, most),
        )
        parts.append(Sequences(tokens_SL[:num_own], tokens_SL[num_own:]))
    return Sequences(
        torch.cat([part.calibration for part in parts]),
        torch.cat([part.held_out for part in parts]),
    )


def check_length(config: Any, length: int, key: str = "calibration.length") -> None:
    """CalibrationError for sequences that the model cannot run on; a warning for longer ones than
    it was trained on."""
    longest = max_length(config)
    if longest is None or length <= longest:
        return
    message = f"sequences of {length} tokens are longer than the {longest} that this model takes"
    if not runs_beyond(config):
        raise CalibrationError(f"{message}; choose a smaller {key}")
    logger.warning("%s: it was not trained on such positions", message)


def sequences_in_cache(config: Any, length: int) -> int:
    """How many sequences' caches, two bytes a value, fit into CACHE_BYTES; at least one."""
    width = config.hidden_size  # also where a model has states in place of heads
    if heads := getattr(config, "num_attention_heads", None):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        width = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    per_sequence = 2 * 2 * config.num_hidden_layers * width * length
    return max(1, CACHE_BYTES // per_sequence)
