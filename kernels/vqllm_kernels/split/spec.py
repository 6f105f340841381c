"""Format split-v1: columns of a matrix in two parts of different formats; see `reference`."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from vqllm_kernels import formats
from vqllm_kernels.formats import FormatSpec, register
from vqllm_kernels.layout import TensorLayout
from vqllm_kernels.split import reference


@register
@dataclass(frozen=True, kw_only=True)
class SplitSpec(FormatSpec):
    """`share` of the columns of tiles have the format `first`, the others the format `rest`.

    The tensors of a part are those of its format, under `first_` or `rest_` + name.
    """

    format_id: ClassVar[str] = "split-v1"

    share: float
    first: FormatSpec
    rest: FormatSpec

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(
                f"{self.format_id}: share {self.share}; allowed is more than 0 and less than 1"
            )

    @property
    def parts(self) -> tuple[FormatSpec, FormatSpec]:
        return self.first, self.rest

    @property
    def tile(self) -> tuple[int, int]:
        return reference.common_tile(self.parts)

    def num_columns(self, cols: int) -> tuple[int, int]:
        """Columns of tiles of each part in a matrix of `cols` columns."""
        return reference.num_columns(self.share, self.grid(1, cols)[1])

    def layout(self, rows: int, cols: int) -> dict[str, TensorLayout]:
        tile_rows, tile_cols = self.tile
        num_tile_rows, _ = self.grid(rows, cols)
        layout = {}
        for name, part, num in zip(reference.PARTS, self.parts, self.num_columns(cols)):
            own = part.layout(num_tile_rows * tile_rows, max(num, 1) * tile_cols)
            per_tile = tile_rows // part.tile[0]
            for key, tensor in own.items():
                if tensor.by_tile_row:
                    shape = (num_tile_rows, per_tile, *tensor.shape[1:])
                    tensor = replace(tensor, shape=shape)
                layout[f"{name}_{key}"] = tensor
        return layout

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        return reference.decode(tensors, self.parts, self.share, rows, cols)

    def decode_rows(self, tensors: dict[str, Tensor], index_N: Tensor, cols: int) -> Tensor:
        _, tile_cols = self.tile
        decoded = []
        for name, part, num in zip(reference.PARTS, self.parts, self.num_columns(cols)):
            if num:
                own = reference.unstacked(reference.part_tensors(tensors, name), part)
                decoded.append(part.decode_rows(own, index_N, num * tile_cols))
        return torch.cat(decoded, 1)[:, :cols]

    def problem(self, tensors: dict[str, Tensor], rows: int, cols: int) -> str | None:
        tile_rows, tile_cols = self.tile
        num_rows = self.grid(rows, cols)[0] * tile_rows
        for name, part, num in zip(reference.PARTS, self.parts, self.num_columns(cols)):
            own = reference.unstacked(reference.part_tensors(tensors, name), part)
            if num and (problem := part.problem(own, num_rows, num * tile_cols)):
                return f"part {name}: {problem}"
        return None

    def to_dict(self) -> dict[str, Any]:
        parts = {"first": self.first.to_dict(), "rest": self.rest.to_dict()}
        return {"format": self.format_id, "share": self.share, **parts}

    @classmethod
    def _from_fields(cls, values: dict[str, Any]) -> Self:
        if set(values) != {"share", "first", "rest"}:
            raise ValueError(
                f"format {cls.format_id}: fields {sorted(values)}, expected "
                "['first', 'rest', 'share']"
            )
        first, rest = (formats.from_dict(values[name]) for name in reference.PARTS)
        return cls(share=values["share"], first=first, rest=rest)
