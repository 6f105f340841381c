"""Format trellis-v1: a bitshift trellis over tiles of 256 weights; the bits are in `reference`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vqllm_kernels.cpu.kernels import PackedKernels
from vqllm_kernels.formats import FormatSpec, register
from vqllm_kernels.kernels import Kernels, Kind
from vqllm_kernels.layout import TensorLayout
from vqllm_kernels.trellis import reference

MIN_STATE_BITS, MAX_STATE_BITS = 4, 16
MAX_TABLE_BITS = 15
PACKED_TILE_ROWS = (16, 32, 64)
"""Rows of the tiles that are multiplied as they are stored on a CPU: whole registers of rows, and
whole pieces of 4 columns."""

if TYPE_CHECKING:
    from vqllm_kernels.cpu.parts import Part


@register
@dataclass(frozen=True, kw_only=True)
class TrellisSpec(FormatSpec):
    """Tiles of `tile_rows` x 256 / `tile_rows` weights in `tile_bits` bits each.

    `table_bits` is the size of a hybrid code's table, 0 for every other code; `step_weights` is V.
    """

    format_id: ClassVar[str] = "trellis-v1"

    tile_rows: int
    code: str
    tile_bits: int
    state_bits: int
    step_weights: int
    table_bits: int = 0

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ValueError(f"{self.format_id}: {problem}")

    def _problem(self) -> str | None:
        if self.tile_rows < 1 or reference.WEIGHTS % self.tile_rows:
            return f"tiles of {self.tile_rows} rows; allowed are the divisors of 256"
        if self.code not in reference.CODES:
            return f"code {self.code!r}; allowed are {', '.join(reference.CODES)}"
        if not MIN_STATE_BITS <= self.state_bits <= MAX_STATE_BITS:
            return (
                f"a state of {self.state_bits} bits; allowed are {MIN_STATE_BITS} to "
                f"{MAX_STATE_BITS}"
            )
        own = (reference.WEIGHTS_OF_STEP.get(self.code, 1),)
        allowed = (1, 2) if self.code == "table" else own
        if self.step_weights not in allowed:
            return f"code {self.code} with {self.step_weights} weights a step; allowed: {allowed}"
        num_steps = reference.WEIGHTS // self.step_weights
        low, high = num_steps, min(8, self.state_bits - 1) * num_steps
        if self.tile_bits % reference.WORD or not low <= self.tile_bits <= high:
            return (
                f"{self.tile_bits} bits a tile; allowed are multiples of {reference.WORD} from "
                f"{low} to {high}"
            )
        if self.code == "hybrid" and not 1 <= self.table_bits <= MAX_TABLE_BITS:
            return f"a table of 2^{self.table_bits} entries; allowed are 1 to {MAX_TABLE_BITS}"
        if self.code != "hybrid" and self.table_bits:
            return f"table_bits {self.table_bits} with code {self.code}, which has none"
        return None

    @property
    def tile(self) -> tuple[int, int]:
        return (self.tile_rows, reference.WEIGHTS // self.tile_rows)

    def layout(self, rows: int, cols: int) -> dict[str, TensorLayout]:
        shape = (*self.grid(rows, cols), self.tile_bits // reference.WORD)
        tensors = {
            "codes": TensorLayout(shape, torch.int16, "codes", by_tile_row=True),
            "scale": TensorLayout((1,), torch.float32, "side"),
        }
        if self.code in reference.STORED:
            entries = self.table_bits if self.code == "hybrid" else self.state_bits
            table = (1 << entries, self.step_weights)
            tensors["table"] = TensorLayout(table, torch.float16, "codebook")
        return tensors

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        return reference.decode(
            tensors,
            self.tile,
            self.code,
            self.tile_bits,
            self.state_bits,
            self.table_bits,
            rows,
            cols,
        )

    def kernels(self, kind: Kind) -> Kernels:
        if kind == "triton":
            from vqllm_kernels.trellis.kernels import TrellisKernels

            return TrellisKernels(self)
        if kind == "packed":
            return PackedKernels(spec=self, parts=self._parts, reason=self._not_packed())
        return super().kernels(kind)

    def _parts(self, tensors: dict[str, Tensor]) -> "list[Part]":
        from vqllm_kernels.cpu import instructions, trellis

        return [trellis.part(self, tensors, instructions.instructions())]

    def _not_packed(self) -> str | None:
        if self.code not in reference.MULTIPLIERS:
            return f"code {self.code} is no sum of bytes"
        if self.tile_rows not in PACKED_TILE_ROWS:
            return f"tiles of {self.tile_rows} rows; packed products take {PACKED_TILE_ROWS}"
        return None
