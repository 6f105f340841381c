"""The base of every packed format, and the registry that finds a format by its id."""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from vqllm_kernels import plugins
from vqllm_kernels.kernels import Kernels, Kind, NoKernels
from vqllm_kernels.layout import TensorLayout, check_numbers, not_finite

SpecClass = TypeVar("SpecClass", bound="type[FormatSpec]")

_FORMATS: dict[str, type["FormatSpec"]] = {}

_WITHOUT: dict[Kind, str] = {
    "triton": "has no kernel",
    "packed": "has no product with packed weights",
    "lookup": "is no table of at most 256 entries",
}
"""What is said of a format without kernels of a kind."""


@dataclass(frozen=True, kw_only=True)
class FormatSpec(ABC):
    """A packed format: which tensors are stored for a linear, and what they mean.

    A subclass is a frozen dataclass whose fields are JSON values; two linears with equal specs are
    decoded by the same code. Sizes are those of the linear itself: a format pads to whole tiles
    in its tensors and crops when it decodes.
    """

    format_id: ClassVar[str]

    @property
    @abstractmethod
    def tile(self) -> tuple[int, int]:
        """(rows, cols) of the matrix coded together."""

    @abstractmethod
    def layout(self, rows: int, cols: int) -> dict[str, TensorLayout]:
        """The stored tensors of a linear of `rows` x `cols`."""

    @abstractmethod
    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        """The weights, float32 [rows, cols], in the transformed basis."""

    def decode_rows(self, tensors: dict[str, Tensor], index_N: Tensor, cols: int) -> Tensor:
        """Some rows of the weights, float32 [N, cols]: what `decode` gives there.

        Only the tiles that hold these rows are decoded.

        Args:
            index_N: rows, integers in any order, repeated or not.
        """
        tile_rows = self.tile[0]
        tile_row_N = index_N // tile_rows
        by_tile_row = {k: t.by_tile_row for k, t in self.layout(tile_rows, cols).items()}
        own = {k: t[tile_row_N] if by_tile_row[k] else t for k, t in tensors.items()}
        W_NTC = self._decode_tile_rows(own, tile_row_N, cols).unflatten(0, (-1, tile_rows))
        return W_NTC[torch.arange(len(index_N), device=index_N.device), index_N % tile_rows]

    def _decode_tile_rows(
        self, tensors: dict[str, Tensor], tile_row_N: Tensor, cols: int
    ) -> Tensor:
        """Weights of some rows of tiles, float32 [N · tile_rows, cols].

        Args:
            tensors: those with an axis of tile rows hold these rows only.
            tile_row_N: where the rows of tiles stand in the matrix, for a format to which it
                matters.
        """
        return self.decode(tensors, len(tile_row_N) * self.tile[0], cols)

    def kernels(self, kind: Kind) -> Kernels:
        """The kernels of one kind; those of a format without any decline every call.

        A format that has kernels overrides this, and imports them inside, on first use.
        """
        return NoKernels(f"{self.format_id} {_WITHOUT[kind]}")

    def problem(self, tensors: dict[str, Tensor], rows: int, cols: int) -> str | None:
        """What is wrong with the values of tensors that are those of the layout, or None.

        Readers refuse tensors with a problem. Here: a number that is not finite. A format in which
        some codes, or some values of other tensors, mean nothing looks for those as well.
        """
        return not_finite(tensors)

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        """Tile rows and tile columns of a linear, padding included."""
        tile_rows, tile_cols = self.tile
        return -(-rows // tile_rows), -(-cols // tile_cols)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the format's id under "format"."""
        return {"format": self.format_id, **asdict(self)}

    @classmethod
    def _from_fields(cls, values: dict[str, Any]) -> Self:
        known = {f.name for f in fields(cls)}
        check_numbers(cls, values)
        if set(values) != known:
            raise ValueError(
                f"format {cls.format_id}: fields {sorted(values)}, expected {sorted(known)}"
            )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def register(spec: SpecClass) -> SpecClass:
    """Class decorator: makes a format known to readers under its `format_id`.

    Readers import the module in `_load_all`, or find it in another installed package by an entry
    point of the group `vqllm.formats` that has the `format_id` for its name.
    """
    known = _FORMATS.setdefault(spec.format_id, spec)
    if known is not spec:
        raise ValueError(f"format {spec.format_id!r} is registered twice: {known} and {spec}")
    return spec


def known_formats() -> list[str]:
    """The ids of all formats that can be read, those of other installed packages included."""
    _load_all()
    _load_plugins()
    return sorted(_FORMATS)


def from_dict(values: dict[str, Any]) -> FormatSpec:
    """The spec that `to_dict` described.

    Raises:
        ValueError: wrong fields, an unknown format, or one of a package that is broken.
    """
    _load_all()
    rest = dict(values)
    format_id = rest.pop("format", None)
    if format_id not in _FORMATS and (problem := _load_plugins().get(str(format_id))):
        raise ValueError(problem)
    if format_id not in _FORMATS:
        raise ValueError(
            f"unknown format {format_id!r}; known: {', '.join(sorted(_FORMATS))}; one of another "
            "package is known where that package is installed"
        )
    return _FORMATS[format_id]._from_fields(rest)


@cache
def _load_plugins() -> dict[str, str]:
    """Formats of other installed packages. What is wrong with those that fail, by id."""
    return plugins.load("vqllm.formats", _FORMATS, FormatSpec)


def _load_all() -> None:
    from vqllm_kernels import (  # noqa: F401 - importing registers
        convolutional,
        d4,
        e8p,
        grouped,
        learned_lattice,
        leech,
        lut,
        pyramid,
        residual,
        sparse,
        split,
        trellis,
        uniform,
    )
