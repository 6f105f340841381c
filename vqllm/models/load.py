"""Models in memory, ready to run, quantized or not."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from vqllm.checkpoint import checksums
from vqllm.checkpoint.reader import Checkpoint, is_checkpoint
from vqllm.checkpoint.stored import tensors_to_load
from vqllm.hf.loading import load_model, load_tokenizer
from vqllm.hf.refusals import has_tokenizer, refuse_no_tokenizer
from vqllm.models import resolve as models


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
    allow_bin: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model to run it, quantized by vqllm or not, and its tokenizer.

    Args:
        path: a quantized folder, or anything that names a model: an ordinary folder, one of
            another tool whose format is read, a `.gguf` file, a hub id, "demo".
        dtype: of activations and of everything that is not packed; "auto" is that of the folder.
        device_map: as in transformers: None is the CPU, "auto" whatever there is, or a dictionary.
        verify: compare a checkpoint's shards with their checksums first.
        trust_remote_code: whether Python code found in the folder may be executed.
        allow_bin: whether weights that are pickles may be loaded, as tensors, and converted.

    Returns:
        The model in evaluation mode, and its tokenizer, or None if the folder has none.

    Raises:
        ModelError: there is no such model, or transformers cannot load it.
        CheckpointError: it is quantized, but damaged or of a newer format; names the file.
    """
    folder = models.resolve(path, trust_remote_code=trust_remote_code, allow_bin=allow_bin).path
    if is_checkpoint(folder):
        Checkpoint.open(folder, verify=False)  # its checksums are compared when it is read
    tokenizer = None
    if has_tokenizer(folder):  # before the model, which takes time and memory
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    with checksums.compared(verify):
        model = load_model(
            folder,
            trust_remote_code=trust_remote_code,
            tensors=tensors_to_load(folder),
            dtype=dtype,
            device_map=device_map,
        )
    return model, tokenizer


def load_to_run(
    model: str | Path,
    device: torch.device,
    trust_remote_code: bool,
    dtype: torch.dtype | None = None,
    *,
    needs_tokenizer: bool = True,
    allow_bin: bool = False,
) -> tuple[Any, Any]:
    """Model and tokenizer on a device.

    Args:
        needs_tokenizer: raise ModelError, before the model is read, where there is none.
        dtype: None is bfloat16 on a CPU, which is there 3 times as fast as float16 and 4 times as
            fast as float32, and that of the folder elsewhere.
    """
    folder = models.resolve(model, trust_remote_code=trust_remote_code, allow_bin=allow_bin).path
    if needs_tokenizer:
        refuse_no_tokenizer(folder)
    return load(
        folder,
        dtype=dtype or (torch.bfloat16 if device.type == "cpu" else "auto"),
        device_map=None if device.type == "cpu" else str(device),
        trust_remote_code=trust_remote_code,
    )
