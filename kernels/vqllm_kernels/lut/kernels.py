"""The Triton kernels of lut-v1, as `launch` runs them; `triton` has their code."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import triton
from torch import Tensor

from vqllm_kernels import fragments, launch
from vqllm_kernels.kernels import Call, Operand, Tensors, as_tensor
from vqllm_kernels.launch import Decoding, Members, Product, Tile
from vqllm_kernels.lut import triton as compiled

if TYPE_CHECKING:
    from vqllm_kernels.lut.spec import LutSpec

MAX_ENTRY = 16
"""Weights of a tile, padded to powers of two, that are looked up at once."""

MAX_GROUPS = 32
"""Groups of 8 rows times groups of 8 tokens of a program: 2 registers each for the sums."""

BY_WORD_BITS = (8, 12, 16)
"""Widths of an index that are cut out of words of 32 bits."""

DECODED_TILE_ROWS, DECODED_CODES = 4, 64
"""Rows of tiles, and codes of each, that a program decodes."""


@dataclass(frozen=True)
class LutKernels(launch.TritonKernels):
    """The `Kernels` of the format."""

    spec: "LutSpec"

    # With codes and a table to choose, the compiler spills for (1, 8).
    members_together: ClassVar[bool] = False

    def declines(self, call: Call) -> str | None:
        tile = self.spec.tile
        if _padded(tile[0]) * _padded(tile[1]) > MAX_ENTRY:
            return f"a tile of {tile} has more than {MAX_ENTRY} weights"
        if call.operation == "matmul" and tile[1] not in (1, 2, 4, 8):
            return f"a tile is {tile[1]} columns wide, not 1, 2, 4 or 8"
        return None

    def product(self, x: Operand, members: Members) -> Product:
        x_NC, spec = as_tensor(x), self.spec
        [codes], [codebook] = members.stored("codes"), members.stored("codebook")
        # Codes in words of 32 bits where they lie so, byte by byte otherwise.
        by_word = spec.index_bits in BY_WORD_BITS and launch.are_whole_words([codes])
        if by_word:
            codes = codes.view(torch.int32)
        word_units, word_unit = launch.in_units(codes.shape[1], fragments.WORD_UNIT)
        col_units, col_unit = launch.in_units(members.cols, fragments.COL_UNIT)
        tile = tiling(x_NC, spec, sum(members.rows))
        # What the compiler makes of the entries decides the layout of its operands.
        is_padded = _padded(spec.tile_rows) != spec.tile_rows
        in_pieces = is_padded and spec.tile_rows * spec.tile_cols % 2 == 0
        k_width = fragments.k_width(
            joined=spec.tile_cols < 8 or is_padded, narrow=not by_word or in_pieces
        )
        # Where the compiler spills without a limit; with 12 bits it spills with one.
        needs_limit = x_NC.dtype == torch.float32 and spec.index_bits != 12
        return Product(
            kernel=compiled.matmul_kernel,
            arguments={
                "x_ptr": x_NC,
                "codes_ptr": codes,
                "codebook_ptr": codebook,
                "col_units": col_units,
                "tile_rows": len(codes),
                "word_units": word_units,
                "V": spec.tile_rows,
                "D": spec.tile_cols,
                "BITS": spec.index_bits,
                "BY_WORD": by_word,
                "WORD_UNIT": word_unit,
                "COL_UNIT": col_unit,
                "TOKEN_GROUPS": tile.column_groups,
                "TILE_GROUPS": tile.row_groups,
                "K_WIDTH": k_width,
            },
            tile=tile,
            group_rows=8 * spec.tile_rows,
            max_registers=168 if needs_limit else None,
            of_one_member=True,
        )

    def decoding(self, tensors: Tensors, rows: int, cols: int) -> Decoding:
        spec, codes = self.spec, tensors["codes"].contiguous()
        num_tile_rows, num_tile_cols = spec.grid(rows, cols)
        col_units, col_unit = launch.in_units(cols, fragments.COL_UNIT)
        return Decoding(
            kernel=compiled.decode_kernel,
            arguments={
                "codes_ptr": codes,
                "codebook_ptr": tensors["codebook"].contiguous(),
                "col_units": col_units,
                "row_bytes": codes.shape[1],
                "V": spec.tile_rows,
                "D": spec.tile_cols,
                "BITS": spec.index_bits,
                "COL_UNIT": col_unit,
                "BLOCK_ROWS": DECODED_TILE_ROWS,
                "BLOCK_CODES": DECODED_CODES,
            },
            grid=(
                triton.cdiv(num_tile_cols, DECODED_CODES),
                triton.cdiv(num_tile_rows, DECODED_TILE_ROWS),
            ),
        )


def tiling(x_NC: Tensor, spec: "LutSpec", rows: int) -> Tile:
    """What a program takes: rows of tiles, and tokens, in groups of 8; as for e8p."""
    pad_v = _padded(spec.tile_rows)
    token_groups = min(fragments.token_groups(x_NC), MAX_GROUPS // pad_v)
    few = launch.few_rows(rows, x_NC.device) or x_NC.dtype == torch.float32
    return Tile(
        row_groups=max(1, (2 if few else 4) // pad_v),
        column_groups=token_groups,
        warps=8 if token_groups <= 2 else 4,
    )


def _padded(size: int) -> int:
    return triton.next_power_of_2(size)
