"""The Triton kernels of e8p-v1 and e81b-v1, as `launch` runs them; `triton` has their code."""

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from vqllm_kernels import fragments, launch
from vqllm_kernels.e8p import reference
from vqllm_kernels.e8p import triton as compiled
from vqllm_kernels.kernels import Call, Operand, Quantized, Tensors, Wanted
from vqllm_kernels.launch import Decoding, Members, Product, Tile

COORDINATE_OF_FIELD = (3, 7, 2, 6, 1, 5, 0, 4)

# Constants that the compiler would rebuild before each use if it knew them (+15 % instructions)
# are loaded from behind the table: fields at bits 1..4 and 5..8 of both halves; twice what a set
# parity flips, all lowest bits of a field and the sign of coordinate 0.
_LOADED_CONSTANTS = (0x001E001E, 0x01E001E0, 2 * 0x1F111111)

MAX_BYTES_TOKENS = 8
"""Tokens up to which x is taken in bytes: 16 columns of the product are 8 tokens of 16 bits, and 2
programs for 16 tokens would decode more than 16-bit floats do."""
MAX_BYTES_COLS = (1 << 17) - 1
"""Columns that a sum of int32 is safe for: 128 · 128 · 2^17 = 2^31 is one too many."""

DECODED_ROWS, DECODED_CODES = 4, 64
"""Rows, and codes of each, that a program decodes."""


@dataclass(frozen=True)
class E8PKernels(launch.TritonKernels):
    """The `Kernels` of one of the two formats."""

    is_e8p: bool

    def declines(self, call: Call) -> str | None:
        """None: they take every size."""
        return None

    def wanted(self, x_NC: Tensor) -> Wanted | None:
        num_tokens, cols = x_NC.shape
        if num_tokens > MAX_BYTES_TOKENS or x_NC.dtype == torch.float32:
            return None
        return _wanted(self.is_e8p, cols)

    def product(self, x: Operand, members: Members) -> Product:
        if isinstance(x, Quantized):
            return self._product_of_bytes(x, members)
        # Codes in words of 32 bits where they lie so, one by one otherwise.
        codes = members.stored("codes")
        by_word = launch.are_whole_words(codes)
        if by_word:
            codes = tuple(own.view(torch.int32) for own in codes)
        word_units, word_unit = launch.in_units(codes[0].shape[1], fragments.WORD_UNIT)
        col_units, col_unit = launch.in_units(members.cols, fragments.COL_UNIT)
        tile = tiling(x, sum(members.rows))
        return Product(
            kernel=compiled.matmul_kernel,
            arguments={
                "x_ptr": x,
                "codes_ptrs": codes,
                "table_ptr": table(self.is_e8p, x.device),
                "scale_ptrs": members.stored("scale"),
                "col_units": col_units,
                "word_units": word_units,
                "IS_E8P": self.is_e8p,
                "BY_WORD": by_word,
                "WORD_UNIT": word_unit,
                "COL_UNIT": col_unit,
                "TOKEN_GROUPS": tile.column_groups,
                "ROW_GROUPS": tile.row_groups,
                "K_WIDTH": fragments.k_width(joined=True, narrow=codes[0].itemsize == 1),
            },
            tile=tile,
            max_registers=fragments.max_registers(tile.column_groups),
        )

    def _product_of_bytes(self, x: Quantized, members: Members) -> Product:
        codes = tuple(launch.words_of(own["codes"]) for own in members.tensors)
        word_units, word_unit = launch.in_units(codes[0].shape[1], fragments.WORD_UNIT)
        tile = bytes_tiling(x.num_tokens, sum(members.rows), codes[0].device)
        return Product(
            kernel=compiled.bytes_matmul_kernel,
            arguments={
                "x_ptr": x.words,
                "codes_ptrs": codes,
                "table_ptr": bytes_table(self.is_e8p, codes[0].device),
                "scale_ptrs": members.stored("scale"),
                "step_ptr": x.step,
                "word_units": word_units,
                "IS_E8P": self.is_e8p,
                "WORD_UNIT": word_unit,
                "COLUMN_GROUPS": tile.column_groups,
                "ROW_GROUPS": tile.row_groups,
                "K_WIDTH": 2 * fragments.k_width(joined=True, narrow=False),
            },
            tile=tile,
            max_registers=fragments.max_registers(tile.column_groups),
        )

    def decoding(self, tensors: Tensors, rows: int, cols: int) -> Decoding:
        codes = tensors["codes"].contiguous()
        col_units, col_unit = launch.in_units(cols, fragments.COL_UNIT)
        row_codes = codes.shape[1]
        return Decoding(
            kernel=compiled.decode_kernel,
            arguments={
                "codes_ptr": codes,
                "table_ptr": table(self.is_e8p, codes.device),
                "scale_ptr": tensors["scale"],
                "col_units": col_units,
                "row_codes": row_codes,
                "IS_E8P": self.is_e8p,
                "COL_UNIT": col_unit,
                "BLOCK_ROWS": DECODED_ROWS,
                "BLOCK_CODES": DECODED_CODES,
            },
            grid=(triton.cdiv(row_codes, DECODED_CODES), triton.cdiv(rows, DECODED_ROWS)),
        )


@cache
def _wanted(is_e8p: bool, cols: int) -> Wanted | None:
    num_codes = triton.cdiv(cols, 8)
    if num_codes % (2 if is_e8p else 4) or cols > MAX_BYTES_COLS:
        return None
    # 2 w, less a field, and less a field read as a signed number.
    offsets = (-7.5, 0.5) if is_e8p else (-8.0, 0.0)
    return Wanted(padded_cols=8 * num_codes, bit=4, offsets=offsets)


def tiling(x_NC: Tensor, rows: int) -> Tile:
    """What a program takes of a product of floats.

    32 rows a program use every activation twice as often as 16; 16 make twice as many programs,
    which a matrix of few rows needs. float32 has registers for 16 only.
    """
    few = launch.few_rows(rows, x_NC.device) or x_NC.dtype == torch.float32
    token_groups = fragments.token_groups(x_NC)
    return Tile(
        row_groups=2 if few else 4,
        column_groups=token_groups,
        warps=8 if token_groups <= 2 else 4,
    )


def bytes_tiling(num_tokens: int, rows: int, device: torch.device) -> Tile:
    """What a program takes of a product of bytes."""
    groups = 1 if num_tokens <= 4 else 2
    few = launch.few_rows(rows, device)
    return Tile(row_groups=2 if few or groups == 2 else 4, column_groups=groups, warps=8)


@cache
def table(is_e8p: bool, device: torch.device) -> Tensor:
    """The fields of all 256 vectors and the constants, int32 [259]."""
    twice_IE = reference.base_table() if is_e8p else reference.e81b_table()
    fields = twice_IE[:, list(COORDINATE_OF_FIELD)].to(torch.int64) + 8
    words = (fields << (4 * torch.arange(8))).sum(1)
    words = torch.cat([words, torch.tensor(_LOADED_CONSTANTS)])
    words = torch.where(words >= 1 << 31, words - (1 << 32), words)
    with torch.inference_mode(False):
        return words.to(torch.int32).to(device)


@cache
def bytes_table(is_e8p: bool, device: torch.device) -> Tensor:
    """`table` with the fields of coordinates 4 to 7, the high halves of bytes, as signed numbers:
    8 less, which is their highest bit turned over."""
    words = table(is_e8p, torch.device("cpu")).clone()
    words[:256] ^= 0x80808080 - (1 << 32)
    return words.to(device)
