"""What tensors a packed linear has: the vocabulary shared by formats, readers and writers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class TensorLayout:
    """Shape and dtype of one stored tensor, and what it holds for the size accounting.

    `by_tile_row` says that its first axis runs over the rows of tiles, so that some rows of the
    matrix can be decoded without the others.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Literal["codes", "codebook", "side"]
    by_tile_row: bool = False

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def check(tensors: dict[str, torch.Tensor], layout: dict[str, TensorLayout], what: str) -> None:
    """Raise ValueError if `tensors` are not exactly those of `layout` (names, shapes, dtypes)."""
    if set(tensors) != set(layout):
        raise ValueError(f"{what}: found tensors {sorted(tensors)}, expected {sorted(layout)}")
    for name, want in layout.items():
        got = tensors[name]
        if tuple(got.shape) != want.shape or got.dtype != want.dtype:
            raise ValueError(
                f"{what}: {name} is {got.dtype} {tuple(got.shape)}, "
                f"expected {want.dtype} {want.shape}"
            )


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Which of the tensors has a NaN or an infinity, and how many; None if there is none."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            return f"{bad} of the {tensor.numel()} numbers of {name} are NaN or infinite"
    return None


def check_numbers(spec: type, values: dict[str, Any]) -> None:
    """Raise ValueError where a field has true or false in the place of a number."""
    kinds = {field.name: field.type for field in fields(spec)}
    for name, value in values.items():
        inner = value if isinstance(value, list) else [value]
        if kinds.get(name) not in (bool, "bool") and any(isinstance(own, bool) for own in inner):
            raise ValueError(f"{name} is {value!r}, which is no number")
