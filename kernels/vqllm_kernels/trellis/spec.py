"""Formats trellis-v1, trellis-v2 and trellis-v3: a bitshift trellis over tiles of 256 weights.

The values of states are computed, or in a table of float16, in trellis-v1 (`reference`). In
trellis-v2 an index that is linear in the state leads to a small table of int8 (`reference_v2`).
trellis-v3 has tiles in an order of its own, and the values of EXL3 (`reference_v3`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vqllm_kernels.cpu.kernels import PackedKernels
from vqllm_kernels.formats import FormatSpec, register
from vqllm_kernels.kernels import Kernels, Kind, NoKernels
from vqllm_kernels.layout import TensorLayout
from vqllm_kernels.trellis import reference, reference_v2, reference_v3

if TYPE_CHECKING:
    from vqllm_kernels.cpu.parts import Part

MIN_STATE_BITS, MAX_STATE_BITS = 4, 16
MAX_TABLE_BITS = 15
PACKED_TILE_ROWS = (16, 32, 64)
"""Rows of the tiles that are multiplied as they are stored on a CPU: whole registers of rows, and
whole pieces of 4 columns."""
PACKED_TABLE_BITS = 7
"""Bits of an index that packed products take: two registers of entries."""
MAX_MASKS = 8
"""Bits of an index of trellis-v2: it fits a byte."""


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
        if self.code not in reference.CODES:
            return f"code {self.code!r}; allowed are {', '.join(reference.CODES)}"
        own = (reference.WEIGHTS_OF_STEP.get(self.code, 1),)
        allowed = (1, 2) if self.code == "table" else own
        if self.step_weights not in allowed:
            return f"code {self.code} with {self.step_weights} weights a step; allowed: {allowed}"
        problem = _ring_problem(
            self.tile_rows, self.tile_bits, self.state_bits, reference.WEIGHTS // self.step_weights
        )
        if problem:
            return problem
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

    def values(self, table: Tensor | None, device: torch.device) -> Tensor:
        """The values of all states, float32 [2^L, V]; `table` is the stored one, if there is."""
        return reference.values(self.code, self.state_bits, self.table_bits, table, device)

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


@register
@dataclass(frozen=True, kw_only=True)
class ParityTrellisSpec(FormatSpec):
    """Tiles of `tile_rows` x 256 / `tile_rows` weights in `tile_bits` bits each, one weight a step.

    `masks` has a number of `state_bits` bits for each bit of the index, the lowest first: which
    bits of the state are added up.
    """

    format_id: ClassVar[str] = "trellis-v2"
    code: ClassVar[str] = "gf2"
    step_weights: ClassVar[int] = 1

    tile_rows: int
    tile_bits: int
    state_bits: int
    masks: tuple[int, ...]

    def __post_init__(self) -> None:
        problem = _ring_problem(
            self.tile_rows, self.tile_bits, self.state_bits, reference.WEIGHTS
        ) or _masks_problem(self.masks, self.state_bits)
        if problem:
            raise ValueError(f"{self.format_id}: {problem}")

    @property
    def tile(self) -> tuple[int, int]:
        return (self.tile_rows, reference.WEIGHTS // self.tile_rows)

    def layout(self, rows: int, cols: int) -> dict[str, TensorLayout]:
        shape = (*self.grid(rows, cols), self.tile_bits // reference.WORD)
        return {
            "codes": TensorLayout(shape, torch.int16, "codes", by_tile_row=True),
            "scale": TensorLayout((1,), torch.float32, "side"),
            "table": TensorLayout((1 << len(self.masks), 1), torch.int8, "codebook"),
        }

    def values(self, table: Tensor | None, device: torch.device) -> Tensor:
        """The values of all states, float32 [2^L, 1]; `table` is the stored one."""
        assert table is not None
        return reference_v2.values(self.masks, self.state_bits, table)

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        return reference_v2.decode(
            tensors, self.tile, self.tile_bits, self.state_bits, self.masks, rows, cols
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
        if self.tile_rows not in PACKED_TILE_ROWS:
            return f"tiles of {self.tile_rows} rows; packed products take {PACKED_TILE_ROWS}"
        if len(self.masks) > PACKED_TABLE_BITS:
            return f"a table of 2^{len(self.masks)} entries; packed products take 2^7"
        # The windows of 8 weights of two rows, or of 4 of one, lie in a word.
        rate = self.tile_bits / reference.WEIGHTS
        weights, bits = (8, 64) if self.tile_rows == 64 else (4, 32)
        if (weights - 1) * rate + 8 + self.state_bits > bits:
            return (
                f"{rate:g} bits a weight and states of {self.state_bits} bits in tiles of "
                f"{self.tile_rows} rows: more than the {bits} bits that are read at once"
            )
        return None


@register
@dataclass(frozen=True, kw_only=True)
class PlacedTrellisSpec(FormatSpec):
    """Tiles of `tile_rows` x 256 / `tile_rows` weights in `tile_bits` bits each, one weight a step.

    Bit k of a step's number is bit `places`[k] of its place in the tile, row-major.
    """

    format_id: ClassVar[str] = "trellis-v3"
    step_weights: ClassVar[int] = 1

    tile_rows: int
    code: str
    tile_bits: int
    state_bits: int
    places: tuple[int, ...]

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ValueError(f"{self.format_id}: {problem}")

    def _problem(self) -> str | None:
        if self.code not in reference_v3.CODES:
            return f"code {self.code!r}; allowed are {', '.join(reference_v3.CODES)}"
        if sorted(self.places) != list(range(8)):
            return f"places {list(self.places)}; each of 0 to 7 must be there once"
        return _ring_problem(self.tile_rows, self.tile_bits, self.state_bits, reference.WEIGHTS)

    @property
    def tile(self) -> tuple[int, int]:
        return (self.tile_rows, reference.WEIGHTS // self.tile_rows)

    def layout(self, rows: int, cols: int) -> dict[str, TensorLayout]:
        shape = (*self.grid(rows, cols), self.tile_bits // reference.WORD)
        return {
            "codes": TensorLayout(shape, torch.int16, "codes", by_tile_row=True),
            "scale": TensorLayout((1,), torch.float32, "side"),
        }

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        sizes = self.tile_bits, self.state_bits, self.places
        return reference_v3.decode(tensors, self.code, self.tile, *sizes, rows, cols)

    def kernels(self, kind: Kind) -> Kernels:
        if kind == "packed":
            return PackedKernels(spec=self, parts=self._parts, reason=self._not_packed())
        if kind == "triton":
            return NoKernels(f"{self.format_id}: tiles in another order have no kernel")
        return super().kernels(kind)

    def _parts(self, tensors: dict[str, Tensor]) -> "list[Part]":
        from vqllm_kernels.cpu import instructions, trellis

        return [trellis.part(self, tensors, instructions.instructions())]

    def _not_packed(self) -> str | None:
        if self.code not in reference.MULTIPLIERS:
            return f"code {self.code} is no sum of bytes"
        # Of 64 rows, windows of two rows are read at once, as neighbours in the ring.
        if self.tile_rows not in PACKED_TILE_ROWS[:2]:
            return f"tiles of {self.tile_rows} rows; packed products take {PACKED_TILE_ROWS[:2]}"
        if self.places[0] != 0:
            return f"places {list(self.places)}: neighbours in a row are not two steps in turn"
        return None


def _ring_problem(tile_rows: int, tile_bits: int, state_bits: int, num_steps: int) -> str | None:
    """What is wrong with the size of tiles, of their rings or of states, or None."""
    if tile_rows < 1 or reference.WEIGHTS % tile_rows:
        return f"tiles of {tile_rows} rows; allowed are the divisors of 256"
    if not MIN_STATE_BITS <= state_bits <= MAX_STATE_BITS:
        return f"a state of {state_bits} bits; allowed are {MIN_STATE_BITS} to {MAX_STATE_BITS}"
    low, high = num_steps, min(8, state_bits - 1) * num_steps
    if tile_bits % reference.WORD or not low <= tile_bits <= high:
        return (
            f"{tile_bits} bits a tile; allowed are multiples of {reference.WORD} from {low} to "
            f"{high}"
        )
    return None


def _masks_problem(masks: tuple[int, ...], state_bits: int) -> str | None:
    """What is wrong with the masks of an index, or None."""
    if not 1 <= len(masks) <= MAX_MASKS:
        return f"{len(masks)} masks; allowed are 1 to {MAX_MASKS}"
    most = (1 << state_bits) - 1
    if not all(type(mask) is int and 1 <= mask <= most for mask in masks):
        return f"masks {list(masks)}; allowed are numbers from 1 to {most}"
    return None
