"""Which tensor of a GGUF file is which linear, and in which order it has the rows.

llama.cpp keeps the rows of q and k of some models in another order. Rows are compared, so that no
architecture is named here: a row of one matrix is looked for among those of the other. H is about
columns, whose order is the same everywhere.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from vqllm.core.listing import listed
from vqllm.errors import ModelError


def tensors_of_linears(reader: Any, names: Iterable[str]) -> dict[str, Any]:
    """The tensors of a file by the full names of the linears whose weights they are.

    Args:
        reader: a `gguf.GGUFReader`.
        names: of linears in transformers' model; those that the file does not have as a matrix of
            their own are left out.

    Raises:
        ModelError: the package `gguf` does not know the architecture, or the model is a mixture of
            experts.
    """
    architecture = reader.get_field("general.architecture").contents()
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise ModelError(
            f"the package gguf {_version()} does not know the architecture {architecture!r}; a "
            "newer one may."
        )
    experts = [tensor.name for tensor in reader.tensors if len(tensor.shape) > 2]
    if experts:
        raise ModelError(
            f"the model is a mixture of experts ({listed(experts)}), which export-gguf does not "
            "write. llama.cpp's own llama-quantize does."
        )
    num_layers = reader.get_field(f"{architecture}.block_count").contents()
    table = gguf.get_tensor_name_map(known[architecture], num_layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    found = {}
    for name in names:
        own = table.get_name(name) or table.get_name(name.replace("language_model.", ""))
        if f"{own}.weight" in tensors:
            found[name] = tensors[f"{own}.weight"]
    return found


def row_order(tensor: Any, W_RC: Tensor) -> Tensor | None:
    """The row of W at each row of a tensor, int64 [R]; None if its rows are not those of W.

    Args:
        tensor: of a `gguf.GGUFReader`.
        W_RC: the weights in transformers' order, of any floating dtype.
    """
    stored_RC = gguf.dequantize(tensor.data, tensor.tensor_type)
    if stored_RC.shape != tuple(W_RC.shape):
        return None
    # In float16, which both may have gone through.
    theirs, ours = (_rows(values) for values in (stored_RC, W_RC.float().cpu().numpy()))
    places: dict[bytes, list[int]] = {}
    for row in reversed(range(len(ours))):
        places.setdefault(ours[row], []).append(row)
    order = []
    for row in theirs:
        left = places.get(row)
        if not left:
            return None
        order.append(left.pop())
    return torch.tensor(order)


def _rows(values_RC: np.ndarray[Any, Any]) -> list[bytes]:
    with np.errstate(over="ignore"):
        halves = values_RC.astype(np.float16) + np.float16(0)  # -0 and 0 are one value
    return [row.tobytes() for row in halves]


def _version() -> str:
    from importlib.metadata import version

    return version("gguf")


def sizes(types: Mapping[str, str]) -> str:
    """How many linears have which type, for a line of log."""
    counts: dict[str, int] = {}
    for own in types.values():
        counts[own] = counts.get(own, 0) + 1
    return ", ".join(f"{number} x {own}" for own, number in counts.items())
