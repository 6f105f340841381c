"""Kernels of lut-v1: decode, and a decode-matmul for up to 64 tokens.

An index is looked up in the table where it lies: one load of a whole entry (16 bytes for 8
weights), which is already the operand of a tensor core when the entry runs along the columns, tile
(1, d); entries along the rows, tile (v, 1), need one permutation for two weights.

The loads bound the speed, not the arithmetic. A table of 256 entries of 8 weights (4 KB) stays in
the first-level cache, one of 4096 (64 KB) does at best, one of 65536 (1 MB) lives in the second
level, where each index of two bytes drags in a sector of 32: do not expect such a table to be
faster than float16 weights. Sizes that are no powers of two are padded in registers: a tile of 6
costs what a tile of 8 costs, and its entries are loaded in pieces of 4 bytes. Tiles of more than 16
weights, or of a width that is not 1, 2, 4 or 8, are left to others.

Index widths of 8, 12 and 16 bits are loaded 16 bytes a lane and cut up in registers; other widths,
and rows that do not begin at a multiple of 4 bytes, are loaded byte by byte.

Static figures for sm_90 at up to 8 tokens (tests/parity holds the budgets): 1.8 instructions a
weight for (1, 8) with float16 and 3.5 for (1, 4) with bfloat16, whose entries have to be converted;
1.8 for (8, 1) at 16 bits, 2.6 for (6, 1) at 12.
"""

import triton
import triton.language as tl

from vqllm_kernels import fragments
from vqllm_kernels.lut import lookup

_lanes = fragments.lanes
_dot = fragments.dot
_index_at = lookup.index_at
_index_in = lookup.index_in
_load_quads = lookup.load_quads
_entry = lookup.entry


@triton.jit
def matmul_kernel(
    x_ptr,  # [num_tokens, cols]
    codes_ptr,  # [tile_rows, row_words]: int32, or uint8 if not BY_WORD
    codebook_ptr,  # float16 [2^BITS, V·D]
    add_ptr,  # float32 [num_tokens, rows], or unused
    y_ptr,  # [num_tokens, rows]
    num_tokens,
    rows,
    col_units,
    tile_rows,
    word_units,
    V: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    BY_WORD: tl.constexpr,
    WORD_UNIT: tl.constexpr,
    COL_UNIT: tl.constexpr,
    HAS_ADD: tl.constexpr,
    TOKEN_GROUPS: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    WARPS: tl.constexpr,
    K_WIDTH: tl.constexpr,
):
    PAD_V: tl.constexpr = triton.next_power_of_2(V)
    SIZE: tl.constexpr = PAD_V * D
    # A product takes CODES indices of a lane: 4 columns at least, 8 where registers allow.
    CODES: tl.constexpr = 1 if D == 8 else (4 if D <= 2 else 2)
    RUN: tl.constexpr = CODES * D
    QUADS: tl.constexpr = 3 if BITS == 12 else 1
    PER_LANE: tl.constexpr = QUADS * 128 // BITS if BY_WORD else 8
    ROW_GROUPS: tl.constexpr = TILE_GROUPS * PAD_V
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    row_words = word_units * WORD_UNIT
    cols = col_units * COL_UNIT

    tile_row, place = _lanes(TILE_GROUPS, WARPS)
    tile_row = tl.program_id(0) * (8 * TILE_GROUPS) + tile_row
    row_ptrs = codes_ptr + tile_row.to(tl.int64) * row_words
    tile_valid = tile_row < tile_rows
    token, place_x = _lanes(TOKEN_GROUPS, WARPS)
    token = (tl.program_id(1) * (8 * TOKEN_GROUPS) + token)[:, None]
    k = place_x[:, None] * (PER_LANE * D) + tl.arange(0, RUN)[None, :]
    x_ptrs = x_ptr + token.to(tl.int64) * cols + k

    acc = tl.zeros((WARPS, 8 * ROW_GROUPS, 8 * TOKEN_GROUPS), tl.float32)
    j = place * PER_LANE
    if BY_WORD:
        word = (place * (4 * QUADS))[:, None] + tl.arange(0, 4)[None, :]
        quad_ptrs = row_ptrs[:, None] + word
        q0, q1, q2 = _load_quads(quad_ptrs, word, tile_valid[:, None], row_words, QUADS)
        num_steps = tl.cdiv(row_words, WARPS * 16 * QUADS)
    else:
        num_steps = tl.cdiv(tl.cdiv(cols, D), WARPS * 4 * PER_LANE)
    for step in tl.range(0, num_steps, num_stages=1):
        if BY_WORD:
            # The words of the next step are on their way while these are used.
            ahead = (step + 1) * (WARPS * 16 * QUADS)
            a0, a1, a2 = _load_quads(
                quad_ptrs + ahead, word + ahead, tile_valid[:, None], row_words, QUADS
            )
        for i in tl.static_range(0, PER_LANE, CODES):
            for n in tl.static_range(CODES):
                if BY_WORD:
                    index = _index_in(q0, q1, q2, i + n, BITS)
                else:
                    at = step * (WARPS * 4 * PER_LANE) + j + (i + n)
                    index = _index_at(row_ptrs, at, tile_valid & (at * D < cols), row_words, BITS)
                entry = _entry(codebook_ptr, index, V, D, SIZE)
                if n == 0:
                    w0 = entry
                elif n == 1:
                    w1 = entry
                elif n == 2:
                    w2 = entry
                else:
                    w3 = entry
            if CODES == 4:
                w = tl.join(tl.join(w0, w2), tl.join(w1, w3))
            elif CODES == 2:
                w = tl.join(w0, w1)
            else:
                w = w0
            # w: [L, v·d, index] -> lanes (tile group, v), then (index, d)
            w = w.reshape(TILE_GROUPS, WARPS * 32, PAD_V, D, CODES).permute(0, 2, 1, 4, 3)
            w = w.reshape(ROW_GROUPS * WARPS * 32, RUN).to(DTYPE)
            col = (step * (WARPS * 4 * PER_LANE) + i) * D
            mask = (token < num_tokens) & (col + k < cols)
            # x: [TOKEN_GROUPS·WARPS·32, RUN], consecutive columns a lane
            acc = _dot(w, tl.load(x_ptrs + col, mask=mask, other=0.0), acc, WARPS, K_WIDTH)
        if BY_WORD:
            q0, q1, q2 = a0, a1, a2

    y = tl.sum(acc, axis=0)
    m = tl.arange(0, 8 * ROW_GROUPS)[:, None]
    v = m // 8 % PAD_V
    tile_row = tl.program_id(0) * (8 * TILE_GROUPS) + m // (8 * PAD_V) * 8 + m % 8
    row = tile_row * V + v
    token = (tl.program_id(1) * (8 * TOKEN_GROUPS) + tl.arange(0, 8 * TOKEN_GROUPS))[None, :]
    offsets = token.to(tl.int64) * rows + row
    mask = (v < V) & (row < rows) & (token < num_tokens)
    if HAS_ADD:
        y += tl.load(add_ptr + offsets, mask=mask, other=0.0)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def decode_kernel(
    codes_ptr,  # uint8 [tile_rows, row_bytes]
    codebook_ptr,  # float16 [2^BITS, V·D]
    add_ptr,  # float32 [rows, cols], or unused
    W_ptr,  # [rows, cols]
    rows,
    col_units,
    row_bytes,
    V: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    COL_UNIT: tl.constexpr,
    HAS_ADD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
):
    PAD_D: tl.constexpr = triton.next_power_of_2(D)
    SIZE: tl.constexpr = triton.next_power_of_2(V) * PAD_D
    cols = col_units * COL_UNIT
    lane = tl.arange(0, BLOCK_ROWS * BLOCK_CODES)
    i = tl.program_id(1) * BLOCK_ROWS + lane // BLOCK_CODES
    j = tl.program_id(0) * BLOCK_CODES + lane % BLOCK_CODES
    valid = (i * V < rows) & (j * D < cols)
    # index: [BLOCK_ROWS·BLOCK_CODES], neighbours side by side
    row_ptrs = codes_ptr + i.to(tl.int64) * row_bytes
    entry = _entry(codebook_ptr, _index_at(row_ptrs, j, valid, row_bytes, BITS), V, D, SIZE)
    e = tl.arange(0, SIZE)[None, :]
    v, d = e // PAD_D, e % PAD_D
    row, col = i[:, None] * V + v, j[:, None] * D + d
    offsets = row.to(tl.int64) * cols + col
    mask = (v < V) & (d < D) & (row < rows) & (col < cols)
    W = entry.to(tl.float32)
    if HAS_ADD:
        W += tl.load(add_ptr + offsets, mask=mask, other=0.0)
    tl.store(W_ptr + offsets, W.to(W_ptr.dtype.element_ty), mask=mask)
