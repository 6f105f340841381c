"""Format d4-v1: 2 bits a weight; the bits are in `reference`."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqllm_kernels.d4 import reference
from vqllm_kernels.formats import FormatSpec, register
from vqllm_kernels.layout import TensorLayout


@register
@dataclass(frozen=True, kw_only=True)
class D4Spec(FormatSpec):
    """Four weights of a row in 8 bits: `codes` uint8, one `scale`."""

    format_id: ClassVar[str] = "d4-v1"

    @property
    def tile(self) -> tuple[int, int]:
        return (1, 4)

    def layout(self, rows: int, cols: int) -> dict[str, TensorLayout]:
        return {
            "codes": TensorLayout(self.grid(rows, cols), torch.uint8, "codes", by_tile_row=True),
            "scale": TensorLayout((1,), torch.float32, "side"),
        }

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        return reference.decode(tensors, rows, cols)
