"""Kernels of e8p-v1 and e81b-v1: decode, and a decode-matmul for up to 64 tokens.

A code becomes eight 16-bit floats in about 24 instructions, without a table of codewords. The
table has one 32-bit word for each of the 256 vectors, four bits f = 2·value + 8 for each
coordinate, so it is 1 KB and stays in the first-level cache. With the signs s and their parity p,
e8p-v1 is

    f' = f ^ 0b1110 where the sign bit is set          (negates the coordinate)
    f' = f' ^ 1 everywhere if p = 1                     (−1/4 in place of +1/4)
    4 w = 2 f' − 15

Three multiplications do the bit work: s · 0x08040201 puts the eight sign bits at distances of four,
times 7 fills the fields, times 0x11111111 adds the bits up, with the parity in bit 31. A field
becomes a float by being or-ed into the mantissa of 1024 (128 for bfloat16), and one packed addition
takes the offset away. 4 w is a small integer, exact in every type; the scale comes at the end.

The fields stand in the order in which the multiplication leaves the signs, coordinates 3 7 2 6 1 5
0 4 from the lowest, so that a 32-bit register gets coordinates two apart; the activations, far
fewer than the weights, are put into the same order.

Static figures for sm_90 at up to 8 tokens (tests/parity holds the budgets): 4.0 instructions a
weight with tiles of 16 rows, 3.6 with 32, and 2.9 for e81b-v1. An H100 issues 29.6·10^12 a second,
which bounds decoding to 8·10^12 weights a second where 2-bit codes arrive at 12·10^12.
"""

from functools import cache
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqllm_kernels import fragments, gpu
from vqllm_kernels.choice import Call
from vqllm_kernels.e8p import reference
from vqllm_kernels.e8p.spec import E8PSpec
from vqllm_kernels.formats import FormatSpec

COORDINATE_OF_FIELD = (3, 7, 2, 6, 1, 5, 0, 4)

# Constants that the compiler would rebuild before each use if it knew them (+15 % instructions)
# are loaded from behind the table: fields at bits 1..4 and 5..8 of both halves; twice what a set
# parity flips, all lowest bits of a field and the sign of coordinate 0.
_LOADED_CONSTANTS = (0x001E001E, 0x01E001E0, 2 * 0x1F111111)

_lanes = fragments.lanes
_pick = fragments.pick
_dot = fragments.dot


@triton.jit
def _fields(word, SHIFT: tl.constexpr, table_ptr, flip, IS_E8P: tl.constexpr):
    """Eight 4-bit fields of the code in bits SHIFT.. of `word`, uint32 [L]."""
    if IS_E8P:
        index = (word >> (SHIFT + 8)) & 0xFF
        f = tl.load(table_ptr + index.to(tl.int32)).to(tl.uint32, bitcast=True)
        signs = (((word >> SHIFT) & 0xFF) * 0x08040201) & 0x88888888
        odd = (signs * 0x11111111) & 0x80000000
        f = f ^ tl.umulhi(odd, flip) ^ ((signs >> 2) * 7)
    else:
        index = (word >> SHIFT) & 0xFF
        f = tl.load(table_ptr + index.to(tl.int32)).to(tl.uint32, bitcast=True)
    return f


@triton.jit
def _unbias(pair, FACTOR: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr):
    """Both halves of a register as floats, times FACTOR, minus BIAS: [L, 2]."""
    # In this order ptxas keeps the halves in place on sm_80; the other way round it swaps them.
    high = (pair >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
    high = high * FACTOR - BIAS if FACTOR != 1 else high - BIAS
    low = (pair & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
    low = low * FACTOR - BIAS if FACTOR != 1 else low - BIAS
    return tl.join(low, high)


@triton.jit
def _floats(f, low_mask, high_mask, BIAS: tl.constexpr, DTYPE: tl.constexpr):
    """2 f − BIAS for all fields: DTYPE [L, half, field bit 0, field bit 1]."""
    if tl.bfloat16 == DTYPE:
        p0 = _unbias(((f << 1) & low_mask) | 0x43004300, 1, 128 + BIAS, DTYPE)
        p1 = _unbias(((f >> 3) & low_mask) | 0x43004300, 1, 128 + BIAS, DTYPE)
        p2 = _unbias(((f >> 7) & low_mask) | 0x43004300, 1, 128 + BIAS, DTYPE)
        p3 = _unbias(((f >> 11) & low_mask) | 0x43004300, 1, 128 + BIAS, DTYPE)
    else:
        a = f << 1
        b = f >> 7
        p0 = _unbias((a & low_mask) | 0x64006400, 1, 1024 + BIAS, DTYPE)
        p1 = _unbias((a & high_mask) | 0x64006400, 1 / 16, 64 + BIAS, DTYPE)
        p2 = _unbias((b & low_mask) | 0x64006400, 1, 1024 + BIAS, DTYPE)
        p3 = _unbias((b & high_mask) | 0x64006400, 1 / 16, 64 + BIAS, DTYPE)
    return tl.join(tl.join(p0, p1), tl.join(p2, p3))


@triton.jit
def _swap(v):
    """[.., 2] with the last dimension reversed."""
    a, b = tl.split(v)
    return tl.join(b, a)


@triton.jit
def _decode_code(
    word, SHIFT: tl.constexpr, table_ptr, constants, IS_E8P: tl.constexpr, DTYPE: tl.constexpr
):
    """4 w of one code: DTYPE [L, half, field bit 0, field bit 1], in the order of the fields.

    Coordinate bits: 0 is not (field bit 1), 1 is not (half), 2 is (field bit 0).
    """
    low_mask, high_mask, flip = constants
    f = _fields(word, SHIFT, table_ptr, flip, IS_E8P)
    if IS_E8P:
        w = _floats(f, low_mask, high_mask, 15, DTYPE)
    else:
        w = _floats(f, low_mask, high_mask, 16, DTYPE)
    return w


@triton.jit
def _constants(table_ptr):
    low_mask = tl.load(table_ptr + 256).to(tl.uint32, bitcast=True)
    high_mask = tl.load(table_ptr + 257).to(tl.uint32, bitcast=True)
    flip = tl.load(table_ptr + 258).to(tl.uint32, bitcast=True)
    return low_mask, high_mask, flip


@triton.jit
def matmul_kernel(
    x_ptr,  # [num_tokens, cols]
    codes_ptr,  # [rows, row_words]: int32 words of 2 or 4 codes, or codes if not BY_WORD
    table_ptr,  # int32 [259]
    scale_ptr,  # float32 [1]
    add_ptr,  # float32 [num_tokens, rows], or unused
    y_ptr,  # [num_tokens, rows]
    num_tokens,
    rows,
    col_units,
    word_units,
    IS_E8P: tl.constexpr,
    BY_WORD: tl.constexpr,
    WORD_UNIT: tl.constexpr,
    COL_UNIT: tl.constexpr,
    HAS_ADD: tl.constexpr,
    TOKEN_GROUPS: tl.constexpr,
    ROW_GROUPS: tl.constexpr,
    WARPS: tl.constexpr,
    K_WIDTH: tl.constexpr,
):
    CODE_BITS: tl.constexpr = 16 if IS_E8P else 8
    PER_LANE: tl.constexpr = 128 // CODE_BITS
    PER_WORD: tl.constexpr = 32 // CODE_BITS if BY_WORD else 1
    STEP: tl.constexpr = WARPS * 4 * (PER_LANE // PER_WORD)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    W_DTYPE: tl.constexpr = tl.bfloat16 if tl.bfloat16 == DTYPE else tl.float16
    row_words = word_units * WORD_UNIT
    cols = col_units * COL_UNIT
    constants = _constants(table_ptr)

    row, place = _lanes(ROW_GROUPS, WARPS)
    row = tl.program_id(0) * (8 * ROW_GROUPS) + row
    row_ptrs = codes_ptr + row.to(tl.int64) * row_words
    token, place_x = _lanes(TOKEN_GROUPS, WARPS)
    token = (tl.program_id(1) * (8 * TOKEN_GROUPS) + token)[:, None]
    k = place_x[:, None] * (PER_LANE * 8) + tl.arange(0, 8)[None, :]
    x_ptrs = x_ptr + token.to(tl.int64) * cols + k

    acc = tl.zeros((WARPS, 8 * ROW_GROUPS, 8 * TOKEN_GROUPS), tl.float32)
    if BY_WORD:
        # words: [ROW_GROUPS·WARPS·32, 4], 16 bytes a lane; the next step's are on their way.
        j = place[:, None] * 4 + tl.arange(0, 4)[None, :]
        word_ptrs = row_ptrs[:, None] + j
        in_rows = (row < rows)[:, None]
        mask = in_rows & (j < row_words)
        words = tl.load(word_ptrs, mask=mask, other=0, eviction_policy="evict_first")
    for start in tl.range(0, row_words, STEP, num_stages=1):
        if BY_WORD:
            mask = in_rows & (j + (start + STEP) < row_words)
            ahead = tl.load(
                word_ptrs + (start + STEP), mask=mask, other=0, eviction_policy="evict_first"
            )
        for i in tl.static_range(PER_LANE):
            if BY_WORD:
                word = _pick(words, i // PER_WORD).to(tl.uint32, bitcast=True)
            else:
                j = start + place * PER_LANE + i
                word = tl.load(row_ptrs + j, mask=(row < rows) & (j < row_words), other=0)
                word = word.to(tl.uint32)
            w = _decode_code(word, i % PER_WORD * CODE_BITS, table_ptr, constants, IS_E8P, W_DTYPE)
            w = w.permute(0, 3, 2, 1).reshape(w.shape[0], 8).to(DTYPE)
            # x: [TOKEN_GROUPS·WARPS·32, 8], 8 consecutive columns a lane
            col = (start * PER_WORD + i) * 8
            x_mask = (token < num_tokens) & (col + k < cols)
            x = tl.load(x_ptrs + col, mask=x_mask, other=0.0)
            x = _swap(x.reshape(x.shape[0], 2, 2, 2)).permute(0, 3, 1, 2)
            acc = _dot(w, _swap(x).reshape(x.shape[0], 8), acc, WARPS, K_WIDTH)
        if BY_WORD:
            words = ahead

    y = tl.sum(acc, axis=0) * (tl.load(scale_ptr) * 0.25)
    row = tl.program_id(0) * (8 * ROW_GROUPS) + tl.arange(0, 8 * ROW_GROUPS)[:, None]
    token = (tl.program_id(1) * (8 * TOKEN_GROUPS) + tl.arange(0, 8 * TOKEN_GROUPS))[None, :]
    offsets = token.to(tl.int64) * rows + row
    mask = (row < rows) & (token < num_tokens)
    if HAS_ADD:
        y += tl.load(add_ptr + offsets, mask=mask, other=0.0)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def decode_kernel(
    codes_ptr,  # [rows, row_codes]
    table_ptr,  # int32 [259]
    scale_ptr,  # float32 [1]
    add_ptr,  # float32 [rows, cols], or unused
    W_ptr,  # [rows, cols]
    rows,
    col_units,
    row_codes,
    IS_E8P: tl.constexpr,
    COL_UNIT: tl.constexpr,
    HAS_ADD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
):
    cols = col_units * COL_UNIT
    lane = tl.arange(0, BLOCK_ROWS * BLOCK_CODES)
    row = tl.program_id(1) * BLOCK_ROWS + lane // BLOCK_CODES
    j = tl.program_id(0) * BLOCK_CODES + lane % BLOCK_CODES
    # codes: [BLOCK_ROWS·BLOCK_CODES], one a lane, neighbours side by side
    mask = (row < rows) & (j < row_codes)
    codes = tl.load(codes_ptr + row.to(tl.int64) * row_codes + j, mask=mask, other=0)
    if IS_E8P:
        bits = codes.to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        bits = codes.to(tl.uint32)
    w = _decode_code(bits, 0, table_ptr, _constants(table_ptr), IS_E8P, tl.float16)
    w = _swap(w.permute(0, 2, 1, 3)).permute(0, 1, 3, 2)
    w = _swap(w).permute(0, 1, 3, 2).reshape(BLOCK_ROWS * BLOCK_CODES, 8)
    W = w.to(tl.float32) * (tl.load(scale_ptr) * 0.25)
    col = j[:, None] * 8 + tl.arange(0, 8)[None, :]
    offsets = row[:, None].to(tl.int64) * cols + col
    mask = (row < rows)[:, None] & (col < cols)
    if HAS_ADD:
        W += tl.load(add_ptr + offsets, mask=mask, other=0.0)
    tl.store(W_ptr + offsets, W.to(W_ptr.dtype.element_ty), mask=mask)


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


def tiling(x_NC: Tensor, rows: int) -> dict[str, int]:
    """Tile sizes of the matmul: tokens and rows in groups of 8, and warps.

    32 rows a program use every activation twice as often as 16; 16 make twice as many programs,
    which a matrix of few rows needs. float32 has registers for 16 only.
    """
    few = rows < 32 * 2 * gpu.num_multiprocessors(x_NC.device) or x_NC.dtype == torch.float32
    token_groups = fragments.token_groups(x_NC)
    return {
        "TOKEN_GROUPS": token_groups,
        "ROW_GROUPS": 2 if few else 4,
        "WARPS": 8 if token_groups <= 2 else 4,
    }


def declines(call: Call) -> str | None:
    """Why these kernels cannot serve a call, or None: they take every size."""
    return None


def wanted(spec: FormatSpec, cols: int) -> None:
    """The kernels take x as it is."""


def matmul(
    x_NC: Tensor,
    tensors: dict[str, Tensor],
    spec: FormatSpec,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    add_NR: Tensor | None = None,
) -> Tensor:
    """x Wᵀ (+ add), `dtype` [N, rows], for up to 64 tokens.

    Args:
        x_NC: float16, bfloat16 or float32 [N, cols].
        tensors: `codes` and `scale` as in `spec.layout(rows, cols)`.
        add_NR: float32 [N, rows].
    """
    x_NC, codes = x_NC.contiguous(), tensors["codes"].contiguous()
    y_NR = torch.empty(len(x_NC), rows, dtype=dtype, device=x_NC.device)
    if y_NR.numel() == 0:
        return y_NR
    is_e8p = isinstance(spec, E8PSpec)
    by_word = codes.shape[1] * codes.itemsize % 4 == 0 and codes.data_ptr() % 4 == 0
    if by_word:
        codes = codes.view(torch.int32)
    word_unit, col_unit = gcd(codes.shape[1], fragments.WORD_UNIT), gcd(cols, fragments.COL_UNIT)
    tile = tiling(x_NC, rows)
    grid = (
        triton.cdiv(rows, 8 * tile["ROW_GROUPS"]),
        triton.cdiv(len(x_NC), 8 * tile["TOKEN_GROUPS"]),
    )
    matmul_kernel[grid](
        x_NC,
        codes,
        table(is_e8p, x_NC.device),
        tensors["scale"],
        x_NC if add_NR is None else add_NR,
        y_NR,
        len(x_NC),
        rows,
        cols // col_unit,
        codes.shape[1] // word_unit,
        IS_E8P=is_e8p,
        BY_WORD=by_word,
        WORD_UNIT=word_unit,
        COL_UNIT=col_unit,
        HAS_ADD=add_NR is not None,
        **tile,
        K_WIDTH=fragments.k_width(joined=True, narrow=codes.itemsize == 1),
        num_warps=tile["WARPS"],
        num_stages=1,
        maxnreg=fragments.max_registers(tile["TOKEN_GROUPS"]),
        enable_fp_fusion=True,
    )
    return y_NR


def decode(
    tensors: dict[str, Tensor],
    spec: FormatSpec,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    add_RC: Tensor | None = None,
) -> Tensor:
    """W (+ add), `dtype` [rows, cols]; arguments as those of `matmul`."""
    codes = tensors["codes"].contiguous()
    W_RC = torch.empty(rows, cols, dtype=dtype, device=codes.device)
    if W_RC.numel() == 0:
        return W_RC
    is_e8p = isinstance(spec, E8PSpec)
    col_unit = gcd(cols, fragments.COL_UNIT)
    block_rows, block_codes = 4, 64
    grid = (triton.cdiv(codes.shape[1], block_codes), triton.cdiv(rows, block_rows))
    decode_kernel[grid](
        codes,
        table(is_e8p, codes.device),
        tensors["scale"],
        codes if add_RC is None else add_RC,
        W_RC,
        rows,
        cols // col_unit,
        codes.shape[1],
        IS_E8P=is_e8p,
        COL_UNIT=col_unit,
        HAS_ADD=add_RC is not None,
        BLOCK_ROWS=block_rows,
        BLOCK_CODES=block_codes,
        enable_fp_fusion=True,
    )
    return W_RC
