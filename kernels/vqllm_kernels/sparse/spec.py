"""Format sparse-v1: a few outliers of every row beside the codes of another format."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from vqllm_kernels import formats
from vqllm_kernels.bitpack import packed_bytes
from vqllm_kernels.formats import FormatSpec, register
from vqllm_kernels.layout import TensorLayout
from vqllm_kernels.sparse import reference


@register
@dataclass(frozen=True, kw_only=True)
class SparseSpec(FormatSpec):
    """`share` of the weights of every row are stored in float16 and added to those of `base`.

    The tensors of the base format stand under `base_` + name; the bits are in `reference`.
    """

    format_id: ClassVar[str] = "sparse-v1"

    share: float
    base: FormatSpec

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(
                f"{self.format_id}: share {self.share}; allowed is more than 0 and less than 1"
            )

    @property
    def tile(self) -> tuple[int, int]:
        return self.base.tile

    def num_cols(self, cols: int) -> int:
        """Columns with padding to whole tiles."""
        return self.grid(1, cols)[1] * self.tile[1]

    def num_outliers(self, cols: int) -> int:
        """Outliers of a row of `cols` columns."""
        return reference.num_outliers(self.share, self.num_cols(cols))

    def layout(self, rows: int, cols: int) -> dict[str, TensorLayout]:
        row = (self.grid(rows, cols)[0], self.tile[0])
        num, width = self.num_outliers(cols), reference.index_bits(self.num_cols(cols))
        columns = (*row, packed_bytes(num, width))
        base = self.base.layout(rows, cols)
        return {
            **{reference.PREFIX + name: tensor for name, tensor in base.items()},
            "outlier_columns": TensorLayout(columns, torch.uint8, "codes", by_tile_row=True),
            "outlier_values": TensorLayout((*row, num), torch.float16, "codes", by_tile_row=True),
        }

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        return reference.decode(tensors, self.base, self.tile[1], self.share, rows, cols)

    def decode_rows(self, tensors: dict[str, Tensor], index_N: Tensor, cols: int) -> Tensor:
        W_NC = self.base.decode_rows(reference.base_tensors(tensors), index_N, cols)
        columns_NB = tensors["outlier_columns"].flatten(0, 1)[index_N]
        num_cols = self.num_cols(cols)
        columns_NK = reference.unpack_columns(columns_NB, self.num_outliers(cols), num_cols)
        values_NK = tensors["outlier_values"].flatten(0, 1)[index_N]
        return W_NC + reference.dense(columns_NK, values_NK, 0, num_cols)[:, :cols]

    def problem(self, tensors: dict[str, Tensor], rows: int, cols: int) -> str | None:
        num_cols = self.num_cols(cols)
        columns = reference.unpack_columns(
            tensors["outlier_columns"], self.num_outliers(cols), num_cols
        )
        if columns.numel() and int(columns.max()) >= num_cols:
            return f"an outlier stands in column {int(columns.max())} of {num_cols}"
        own = {"outlier_values": tensors["outlier_values"]}
        return super().problem(own, rows, cols) or self.base.problem(
            reference.base_tensors(tensors), rows, cols
        )

    def to_dict(self) -> dict[str, Any]:
        return {"format": self.format_id, "share": self.share, "base": self.base.to_dict()}

    @classmethod
    def _from_fields(cls, values: dict[str, Any]) -> Self:
        if set(values) != {"share", "base"}:
            raise ValueError(
                f"format {cls.format_id}: fields {sorted(values)}, expected ['base', 'share']"
            )
        return cls(share=values["share"], base=formats.from_dict(values["base"]))
