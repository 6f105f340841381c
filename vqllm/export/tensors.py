"""Which tensor of a GGUF file is which linear, and in which order it has the rows.

llama.cpp keeps the rows of q and k of some models in another order. Rows are compared, so that no
architecture is named here: a row of one matrix is looked for among those of the other. H is about
columns, whose order is the same everywhere. The experts of a layer are one tensor [E, R, C].
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from vqllm.errors import ModelError


@dataclass(frozen=True)
class Place:
    """Where a file has the weight of a linear."""

    tensor: Any
    """of a `gguf.GGUFReader`"""
    expert: int | None = None
    """index in the tensor of all experts of a layer; None where the tensor is the matrix itself"""

    @property
    def name(self) -> str:
        """Of the tensor."""
        return self.tensor.name

    @property
    def num_parts(self) -> int:
        """Linears in the tensor."""
        return 1 if self.expert is None else len(self.tensor.data)

    def values(self) -> np.ndarray[Any, Any]:
        """The weights [R, C] in the file's order of rows, float32."""
        own = self.tensor.data if self.expert is None else self.tensor.data[self.expert]
        return gguf.dequantize(own, self.tensor.tensor_type)


def places_of_linears(reader: Any, names: Iterable[str]) -> dict[str, Place]:
    """Where a file has the weights of linears, by their full names.

    Args:
        reader: a `gguf.GGUFReader`.
        names: of linears in transformers' model; those that the file does not have as a matrix of
            their own are left out.

    Raises:
        ModelError: the package `gguf` does not know the architecture.
    """
    architecture = reader.get_field("general.architecture").contents()
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise ModelError(
            f"the package gguf {_version()} does not know the architecture {architecture!r}; a "
            "newer one may."
        )
    num_layers = reader.get_field(f"{architecture}.block_count").contents()
    table = gguf.get_tensor_name_map(known[architecture], num_layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    found = {}
    for name in names:
        for key, expert in _known_as(name):
            tensor = tensors.get(f"{table.get_name(key)}.weight")
            if tensor is None or len(tensor.shape) != (2 if expert is None else 3):
                continue
            if expert is None or expert < len(tensor.data):
                found[name] = Place(tensor, expert)
                break
    return found


def _known_as(name: str) -> Iterator[tuple[str, int | None]]:
    """What the table of `gguf` may call a linear, and its expert: `experts.gate_proj` for
    `experts.17.gate_proj`."""
    for full in (name, name.replace("language_model.", "")):
        yield full, None
        pieces = full.split(".")
        for i in reversed(range(len(pieces))):
            if pieces[i].isdigit():
                yield ".".join([*pieces[:i], *pieces[i + 1 :]]), int(pieces[i])


def of_whole_tensors(places: Mapping[str, Place], names: Collection[str]) -> set[str]:
    """Those of these linears whose tensors have no other part: a tensor has one type."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(places[name].name, []).append(name)
    whole = (own for own in parts.values() if len(own) == places[own[0]].num_parts)
    return {name for own in whole for name in own}


def in_order(parts: Mapping[str, np.ndarray[Any, Any]], places: Mapping[str, Place]) -> Any:
    """The linears of one tensor, by name, as the tensor has them: [R, ..] or [E, R, ..]."""
    names = sorted(parts, key=lambda name: places[name].expert or 0)
    if places[names[0]].expert is None:
        return parts[names[0]]
    return np.stack([parts[name] for name in names])


def row_order(place: Place, W_RC: Tensor) -> Tensor | None:
    """The row of W at each row in a file, int64 [R]; None if its rows are not those of W.

    Args:
        W_RC: the weights in transformers' order, of any floating dtype.
    """
    stored_RC = place.values()
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
