"""Numbers in config.json that decide how many modules are made, compared with what is stored.

transformers makes a module, and entries of several lists, for each layer and expert that
config.json names, before it looks at a weight: a number with three digits too many takes it a
minute, or all memory.
"""

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
FEW = 1000
"""So many are made in seconds, whatever is stored: layers may share their tensors."""
MANY_EXPERTS = 100_000
MAX_HEADER_BYTES = 100_000_000


def refuse_claims(folder: Path) -> None:
    """Raise ModelError where config.json names many more layers or experts than can be stored, or
    cannot be read. Reads the headers of weight files only if it names many."""
    try:
        config = json_text.read(folder / CONFIG)
    except FileNotFoundError:
        return  # whoever needs it says so
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder / CONFIG} cannot be read: {error}. Fetch the model again."
        ) from error
    for key, number in _numbers(config):
        if key in EXPERTS and number > MANY_EXPERTS:
            raise _too_many(folder, key, number, "experts are more than any model has")
        if key in LAYERS and number > FEW and number > (stored := _num_tensors(folder)):
            raise _too_many(folder, key, number, f"its files have {stored} tensors")


def _too_many(folder: Path, key: str, number: int, but: str) -> ModelError:
    return ModelError(
        f"{folder / CONFIG} is damaged: {key} is {number}, and {but}. Fetch the model again."
    )


def _numbers(values: Any) -> Iterator[tuple[str, int]]:
    """Whole numbers in JSON values, with their keys."""
    if isinstance(values, list):
        for value in values:
            yield from _numbers(value)
    elif isinstance(values, dict):
        for key, value in values.items():
            if type(value) is int:
                yield key, value
            else:
                yield from _numbers(value)


def _num_tensors(folder: Path) -> int:
    """How many tensors the headers of the folder's safetensors files name."""
    total = 0
    for path in folder.glob("*.safetensors"):
        if path.is_file():
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                total += file.read(min(length, MAX_HEADER_BYTES)).count(b'"data_offsets"')
    return total
