"""The Triton kernels of trellis-v1 and trellis-v2, as `launch` runs them; `triton` has their code.

The parities of trellis-v2 are not computed in a kernel: the values of its states are looked up, as
those of a stored table of all states.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from vqllm_kernels import fragments, launch
from vqllm_kernels.kernels import (
    Call,
    Operand,
    Quantized,
    Tensors,
    Wanted,
    as_tensor,
)
from vqllm_kernels.launch import Decoding, Members, Product, Split, Tile
from vqllm_kernels.trellis import reference
from vqllm_kernels.trellis import triton as compiled

if TYPE_CHECKING:
    from vqllm_kernels.trellis.spec import ParityTrellisSpec, TrellisSpec

MIN_TILE_ROWS, MAX_TILE_ROWS = 8, 64
PART_ROWS = 32
"""Rows of a tile that a lane holds sums for: 2 registers each for 8 columns of the product."""
WARPS, DECODE_WARPS = 8, 4
MAX_SPLIT_COLS = 32767
"""Columns that a sum of int32 is safe for: 4 · 128 · 128 · 32768 = 2^31 is one too many."""


@dataclass(frozen=True)
class TrellisKernels(launch.TritonKernels):
    """The `Kernels` of a format: float16 and bfloat16, and float32 too for sums of bytes."""

    spec: "TrellisSpec | ParityTrellisSpec"

    @property
    def mode(self) -> str:
        """How states become values: "bytes", "3inst" or "table"."""
        if self.spec.code in reference.MULTIPLIERS:
            return "bytes"
        return "3inst" if self.spec.code == "3inst" else "table"

    @property
    def parts(self) -> int:
        """Into how many parts the rows of a tile are cut."""
        return max(1, self.spec.tile_rows // PART_ROWS)

    def declines(self, call: Call) -> str | None:
        spec = self.spec
        if not MIN_TILE_ROWS <= spec.tile_rows <= MAX_TILE_ROWS:
            return (
                f"tiles of {spec.tile_rows} rows; the kernel takes {MIN_TILE_ROWS} to "
                f"{MAX_TILE_ROWS}"
            )
        if spec.tile_bits % (32 * self.parts):
            rate = spec.tile_bits / reference.WEIGHTS
            return f"{rate:g} bits: not whole words of 32 bits for {PART_ROWS} rows of a tile"
        if call.operation == "matmul" and call.dtype == torch.float32 and self.mode != "bytes":
            return f"float32 activations with code {spec.code}: its products have 16 bits"
        return None

    def wanted(self, x_NC: Tensor) -> Wanted | None:
        return _wanted(self, x_NC.shape[1])

    def product(self, x: Operand, members: Members) -> Product:
        spec, mode = self.spec, self.mode
        num_tokens = len(members.ys[0])
        tiles_c = spec.grid(1, members.cols)[1]
        # Bytes, with the steps of tokens, or floats, whose steps are not used.
        if mode == "bytes" and isinstance(x, Quantized):
            values, step, columns_of_token = x.words, x.step, x.parts
        else:
            values, columns_of_token = as_tensor(x), 1
            step = values
        # 3inst: sums of two float16, less their mean; the deviation comes at the end.
        factor, mean = 1.0, 0.0
        if mode == "3inst":
            moments = reference.moments_of(spec.code, spec.state_bits)
            factor, mean = 1 / moments.deviations[0], moments.means[0]
        # A step of a program: a tile for each lane, or one part of its rows.
        step_tiles = WARPS // self.parts * 4
        groups = token_groups(columns_of_token * num_tokens)
        return Product(
            kernel=compiled.matmul_kernel,
            arguments={
                **self._constants(),
                "x_ptr": values,
                "codes_ptrs": tuple(launch.words_of(own["codes"]) for own in members.tensors),
                "table_ptrs": self._tables(members, values.dtype) if mode == "table" else (values,),
                "cols": members.cols,
                "tiles_c": tiles_c,
                "MODE": mode,
                "MEAN": mean,
                "X_PARTS": columns_of_token,
                "TOKEN_GROUPS": groups,
                "K_WIDTH": _k_width(mode),
            },
            tile=Tile(row_groups=1, column_groups=groups, warps=WARPS),
            group_rows=8 * spec.tile_rows,
            split=Split(
                steps=triton.cdiv(tiles_c, step_tiles),
                most_steps=max(1, MAX_SPLIT_COLS // (step_tiles * spec.tile[1])),
                kernel=compiled.finish_kernel,
                arguments={
                    "scale_ptrs": members.stored("scale"),
                    "step_ptr": step,
                    "factor": factor,
                    "BYTES": mode == "bytes",
                },
            ),
        )

    def decoding(self, tensors: Tensors, rows: int, cols: int) -> Decoding:
        spec = self.spec
        codes = launch.words_of(tensors["codes"])
        by_sum = self.mode == "bytes"
        if by_sum:
            table = _table_by_sum(spec.code, spec.state_bits, codes.device)
        else:
            table = spec.values(tensors.get("table"), codes.device)
        tiles_r, tiles_c = spec.grid(rows, cols)
        step_tiles = DECODE_WARPS // self.parts * 4
        return Decoding(
            kernel=compiled.decode_kernel,
            arguments={
                **self._constants(),
                "codes_ptr": codes,
                "table_ptr": table,
                "scale_ptr": tensors["scale"],
                "cols": cols,
                "tiles_r": tiles_r,
                "tiles_c": tiles_c,
                "BY_SUM": by_sum,
                "WARPS": DECODE_WARPS,
            },
            grid=(triton.cdiv(tiles_c, step_tiles), triton.cdiv(tiles_r, 8)),
            options={"num_warps": DECODE_WARPS, "num_stages": 1, "enable_fp_fusion": False},
        )

    def _constants(self) -> dict[str, object]:
        """What both kernels are compiled for."""
        spec = self.spec
        num_words = spec.tile_bits // 32
        own = num_words // self.parts
        return {
            "NUM_WORDS": num_words,
            "TILE_ROWS": spec.tile_rows,
            "L": spec.state_bits,
            "V": spec.step_weights,
            "MULTIPLIER": reference.MULTIPLIERS.get(spec.code, 0),
            "ADDEND": reference.ADDENDS.get(spec.code, 0),
            "FLIP": spec.code in reference.UNSIGNED,
            "PARTS": self.parts,
            "CHUNK": next(size for size in (4, 2, 1) if own % size == 0),
        }

    def _tables(self, members: Members, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The values of all states, [2^L, V], of each member; nothing is rounded.

        They are float16, or in the dtype of x where that holds them: integers of a byte.
        """
        spec, tables = self.spec, members.stored("table")
        if spec.code == "table":
            return tables
        own = dtype if spec.code == "gf2" else torch.float16
        return tuple(spec.values(table, table.device).to(own) for table in tables)


@cache
def _wanted(kernels: TrellisKernels, cols: int) -> Wanted | None:
    """Sums of bytes take x in bytes, with what their values are divided by, and their means, in
    it."""
    if kernels.mode != "bytes":
        return None
    spec = kernels.spec
    moments = reference.moments_of(spec.code, spec.state_bits)
    return Wanted(
        padded_cols=spec.grid(1, cols)[1] * spec.tile[1],
        factors=(1 / moments.deviations[0], 1 / moments.deviations[-1]),
        offsets=(-moments.means[0], -moments.means[-1]),
    )


@cache
def _table_by_sum(code: str, state_bits: int, device: torch.device) -> Tensor:
    """The value of every sum of bytes that are read as unsigned: float32 [1021] or [2 · 511]."""
    moments = reference.moments_of(code, state_bits)
    num = 4 // len(moments.means)
    sums = torch.arange(num * 255 + 1, dtype=torch.float64) - num * 128
    values = [(sums - m) / d for m, d in zip(moments.means, moments.deviations)]
    with torch.inference_mode(False):
        return torch.cat(values).float().to(device)


def token_groups(columns: int) -> int:
    """Groups of 8 columns of the product of a program.

    Each group takes 64 registers for its sums. More columns are dealt out to programs that decode
    the same weights again.
    """
    return 1 if columns <= 8 else 2


def _k_width(mode: str) -> int:
    """Consecutive k of a lane in the operand layout that the compiler picks; see
    `fragments.k_width`."""
    if mode == "bytes":
        return 2 * fragments.k_width(joined=True, narrow=False)
    return fragments.k_width(joined=True, narrow=mode == "3inst")
