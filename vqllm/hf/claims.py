"""Numbers in config.json that decide how many modules and tensors are made, compared with what is
stored.

transformers makes a module, and entries of several lists, for each layer and expert that
config.json names, and tables of positions as wide as a head, before it looks at a weight: a number
with three digits too many takes it a minute, or all memory.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vqllm.core import json_text
from vqllm.errors import ModelError

CONFIG = "config.json"
LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
    "num_decoder_layers", "num_encoder_layers", "num_nextn_predict_layers", "depth",
)  # fmt: skip
EXPERTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "n_shared_experts",
    "num_shared_experts",
)  # fmt: skip
SIZES = {
    "head_dim": 1 << 16, "rotary_dim": 1 << 16,
    "num_attention_heads": 1 << 14, "num_heads": 1 << 14, "n_heads": 1 << 14, "n_head": 1 << 14,
    "chunk_size": 1 << 12, "mamba_chunk_size": 1 << 12, "max_seq_len": 1 << 20,
    "partial_rotary_factor": 16,
}  # fmt: skip
"""More than any model has. Tables are as large, whatever is stored: frequencies and slopes of
positions, and the matrices of a chunk of a recurrence."""
FEW = 1000
"""So many are made in seconds, whatever is stored: layers may share their tensors."""
MANY_EXPERTS = 100_000
NUMBERS = 2
"""of a model for each stored one, at most: tied ones are stored once, and a head may be new."""
NUMBERS_PER_BYTE = 8
"""of a quantized model, at most"""
FEW_NUMBERS = 1 << 24
"""So many cost nothing, whatever is stored."""
MAX_HEADER_BYTES = 100_000_000


def refuse_claims(folder: Path) -> None:
    """Raise ModelError where config.json names many more layers or experts than can be stored, or
    sizes that no model has, or cannot be read. Reads the headers of weight files only if it names
    many layers."""
    try:
        config = json_text.read(folder / CONFIG)
    except FileNotFoundError:
        return  # whoever needs it says so
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder / CONFIG} cannot be read: {error}. Fetch the model again."
        ) from error
    refuse_sizes(config, folder / CONFIG)
    for key, number in _numbers(config):
        if key in LAYERS and number > FEW and number > (stored := len(_sizes(folder))):
            raise _too_many(folder / CONFIG, key, number, f"its files have {stored} tensors")


def refuse_sizes(config: Any, file: Path) -> None:
    """Raise ModelError where the values of a configuration, from this file, name more than any
    model has."""
    for key, number in _numbers(config):
        if key in EXPERTS and number > MANY_EXPERTS:
            raise _too_many(file, key, number, "experts are more than any model has")
        if number > SIZES.get("head_dim" if key.endswith("head_dim") else key, number):
            raise _too_many(file, key, number, "no model has so many")


def refuse_larger(model: Any, stored: int, place: str) -> None:
    """Raise ModelError for a model, on the meta device, of many more numbers than are stored.

    transformers fills what is not stored, or in another shape, before it says so.

    Args:
        stored: how many numbers its files have, or can have.
        place: of its configuration, for the message.
    """
    sizes = {name: tensor.numel() for name, tensor in model.named_parameters()}
    if sum(sizes.values()) > max(NUMBERS * stored, FEW_NUMBERS):
        name = max(sizes, key=sizes.__getitem__)
        raise ModelError(
            f"{place} asks for {sum(sizes.values())} numbers, {sizes[name]} of them for {name}, "
            f"and the files have at most {stored}. It is that of another model, or was changed: "
            "put back the one that was written with these weights."
        )


def stored_numbers(folder: Path, quantized: bool) -> int:
    """How many numbers the folder's safetensors files have; of a quantized model, as many as they
    can mean."""
    if quantized:
        return NUMBERS_PER_BYTE * sum(path.stat().st_size for path in _files(folder))
    return sum(_sizes(folder))


def _too_many(file: Path, key: str, number: float, but: str) -> ModelError:
    return ModelError(f"{file} is damaged: {key} is {number}, and {but}. Fetch the model again.")


def _numbers(values: Any) -> Iterator[tuple[str, float]]:
    """Numbers in JSON values, with their keys."""
    if isinstance(values, list):
        for value in values:
            yield from _numbers(value)
    elif isinstance(values, dict):
        for key, value in values.items():
            if type(value) in (int, float):
                yield key, value
            else:
                yield from _numbers(value)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.safetensors") if path.is_file()]


def _sizes(folder: Path) -> list[int]:
    """How many numbers each tensor has that the headers of the folder's safetensors files name."""
    sizes = []
    for path in _files(folder):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json_text.loads(file.read(min(length, MAX_HEADER_BYTES)))
            header.pop("__metadata__", None)
            sizes += [math.prod(tensor["shape"]) for tensor in header.values()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} is damaged: {error}. Fetch the model again.") from error
    return sizes
