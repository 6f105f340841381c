"""Kernels of e8p-v1 and e81b-v1: decode, and a decode-matmul for up to 64 tokens.

There is no table of codewords. The table has one 32-bit word for each of the 256 vectors, four bits
f = 2·value + 8 for each coordinate, so it is 1 KB and stays in the first-level cache. With the
signs s and their parity p, e8p-v1 is

    f' = f ^ 0b1110 where the sign bit is set          (negates the coordinate)
    f' = f' ^ 1 everywhere if p = 1                     (−1/4 in place of +1/4)
    4 w = 2 f' − 15

Three multiplications do the bit work: s · 0x08040201 puts the eight sign bits at distances of four,
times 7 fills the fields, times 0x11111111 adds the bits up, with the parity in bit 31. The fields
stand in the order in which the multiplication leaves the signs, coordinates 3 7 2 6 1 5 0 4 from
the lowest; the activations, far fewer than the weights, are put into the same order.

Up to 8 tokens of 16-bit activations go to int8 tensor cores, as `activations` makes them. Then one
mask leaves four int8 operands: the low halves of the bytes, which are f, and another the high
halves, 16 f. As f of those would not fit a signed byte, the table has them less 8. Each of the two
has a sum of its own, exact in int32; what the weights have more or less is the token's offset.

Otherwise a field becomes a 16-bit float by being or-ed into the mantissa of 1024 (128 for
bfloat16), and one packed addition takes the offset away. A 32-bit register gets coordinates two
apart. 4 w is a small integer, exact in every type. The scale comes at the end either way.

Static figures for sm_90 (tests/parity holds the budgets), instructions a weight: 2.4 up to 4 tokens
with tiles of 16 rows, 2.3 with 32, 2.7 up to 8 tokens, and 1.3 for e81b-v1; in 16-bit floats 4.0,
3.6, 4.0, and 2.9. An H100 issues 29.6·10^12 a second, which bounds decoding to 12·10^12 weights a
second, and 2-bit codes arrive at 12·10^12. What the look-ups cost, one for eight weights in a table
of 8 cache lines, is not in these figures.
"""

import triton
import triton.language as tl

from vqllm_kernels import fragments, members
from vqllm_kernels.trellis import tiles

_lanes = fragments.lanes
_pick = fragments.pick
_dot = fragments.dot
_bytes = tiles.bytes_of
_choose = members.choose
_locate = members.locate


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
    codes_ptrs,  # [rows, row_words] of each member: int32 words of 2 or 4 codes, or codes if not
    # BY_WORD
    table_ptr,  # int32 [259]
    scale_ptrs,  # float32 [1] of each member
    add_ptrs,  # float32 [num_tokens, rows] of each member, or unused
    y_ptrs,  # [num_tokens, rows] of each member
    num_tokens,
    every_rows,  # rows of each member
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

    member, program, _ = _locate(tl.program_id(0), every_rows, 8 * ROW_GROUPS)
    codes_ptr = _choose(member, codes_ptrs)
    rows = _choose(member, every_rows)
    row, place = _lanes(ROW_GROUPS, WARPS)
    row = program * (8 * ROW_GROUPS) + row
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

    y = tl.sum(acc, axis=0) * (tl.load(_choose(member, scale_ptrs)) * 0.25)
    row = program * (8 * ROW_GROUPS) + tl.arange(0, 8 * ROW_GROUPS)[:, None]
    token = (tl.program_id(1) * (8 * TOKEN_GROUPS) + tl.arange(0, 8 * TOKEN_GROUPS))[None, :]
    offsets = token.to(tl.int64) * rows + row
    mask = (row < rows) & (token < num_tokens)
    if HAS_ADD:
        y += tl.load(_choose(member, add_ptrs) + offsets, mask=mask, other=0.0)
    y_ptr = _choose(member, y_ptrs)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bytes_dot(w, x, acc, WARPS: tl.constexpr, K_WIDTH: tl.constexpr):
    """acc + W xᵀ for two words of 4 bytes a lane: w uint32 [G·WARPS·32, 2], x [H·WARPS·32, 2]."""
    G: tl.constexpr = w.shape[0] // (WARPS * 32)
    H: tl.constexpr = x.shape[0] // (WARPS * 32)
    w = _bytes(w).reshape(G, WARPS, 8, 4, 8 // K_WIDTH, K_WIDTH).permute(1, 0, 2, 4, 3, 5)
    x = _bytes(x).reshape(H, WARPS, 8, 4, 8 // K_WIDTH, K_WIDTH).permute(1, 4, 3, 5, 0, 2)
    w = w.reshape(WARPS, 8 * G, 32)
    return tl.dot(w, x.reshape(WARPS, 32, 8 * H), acc, out_dtype=tl.int32)


@triton.jit
def _reversed_bytes(v):
    return (v << 24) | ((v & 0xFF00) << 8) | ((v >> 8) & 0xFF00) | (v >> 24)


@triton.jit
def bytes_matmul_kernel(
    x_ptr,  # int32 [num_tokens, 2, x_words] of 4 int8
    codes_ptrs,  # int32 [rows, row_words] of 2 or 4 codes, of each member
    table_ptr,  # int32 [259], the fields of coordinates 4 to 7 as signed numbers
    scale_ptrs,  # float32 [1] of each member
    step_ptr,  # float32 [num_tokens, 2]
    add_ptrs,  # float32 [num_tokens, rows] of each member, or unused
    y_ptrs,  # [num_tokens, rows] of each member
    num_tokens,
    every_rows,  # rows of each member
    word_units,
    IS_E8P: tl.constexpr,
    WORD_UNIT: tl.constexpr,
    HAS_ADD: tl.constexpr,
    COLUMN_GROUPS: tl.constexpr,
    ROW_GROUPS: tl.constexpr,
    WARPS: tl.constexpr,
    K_WIDTH: tl.constexpr,
):
    CODE_BITS: tl.constexpr = 16 if IS_E8P else 8
    PER_WORD: tl.constexpr = 32 // CODE_BITS
    STEP: tl.constexpr = WARPS * 4 * 4
    COLUMNS: tl.constexpr = 8 * COLUMN_GROUPS
    row_words = word_units * WORD_UNIT
    x_words = row_words * (2 * PER_WORD)
    flip = tl.load(table_ptr + 258).to(tl.uint32, bitcast=True)

    member, program, _ = _locate(tl.program_id(0), every_rows, 8 * ROW_GROUPS)
    codes_ptr = _choose(member, codes_ptrs)
    rows = _choose(member, every_rows)
    row, place = _lanes(ROW_GROUPS, WARPS)
    row = program * (8 * ROW_GROUPS) + row
    column, place_x = _lanes(COLUMN_GROUPS, WARPS)
    column = (tl.program_id(1) * COLUMNS + column)[:, None]
    k = place_x[:, None] * (8 * PER_WORD) + tl.arange(0, 4)[None, :]
    x_ptrs = x_ptr + column.to(tl.int64) * x_words + k

    low = tl.zeros((WARPS, 8 * ROW_GROUPS, COLUMNS), tl.int32)
    high = tl.zeros((WARPS, 8 * ROW_GROUPS, COLUMNS), tl.int32)
    # words: [ROW_GROUPS·WARPS·32, 4], 16 bytes a lane; the next step's are on their way.
    j = place[:, None] * 4 + tl.arange(0, 4)[None, :]
    word_ptrs = codes_ptr + row[:, None].to(tl.int64) * row_words + j
    in_rows = (row < rows)[:, None]
    mask = in_rows & (j < row_words)
    words = tl.load(word_ptrs, mask=mask, other=0, eviction_policy="evict_first")
    for start in tl.range(0, row_words, STEP, num_stages=1):
        mask = in_rows & (j + (start + STEP) < row_words)
        ahead = tl.load(
            word_ptrs + (start + STEP), mask=mask, other=0, eviction_policy="evict_first"
        )
        for i in tl.static_range(2 * PER_WORD):
            # Two codes, and their 16 activations.
            word = _pick(words, 2 * i // PER_WORD).to(tl.uint32, bitcast=True)
            a = _fields(word, 2 * i % PER_WORD * CODE_BITS, table_ptr, flip, IS_E8P)
            b = _fields(word, (2 * i % PER_WORD + 1) * CODE_BITS, table_ptr, flip, IS_E8P)
            f = tl.join(a, b)
            # x: [COLUMN_GROUPS·WARPS·32, 4], 16 consecutive columns a lane
            at = (start * PER_WORD * 2) + 4 * i
            x_mask = (column < 2 * num_tokens) & (at + k < x_words)
            x = tl.load(x_ptrs + at, mask=x_mask, other=0).to(tl.uint32, bitcast=True)
            # The fields of a byte are coordinates b and b + 4 from the highest byte on.
            x = _reversed_bytes(x)
            x_low, x_high = tl.split(x.reshape(x.shape[0], 2, 2))
            low = _bytes_dot(f & 0x0F0F0F0F, x_low, low, WARPS, K_WIDTH)
            high = _bytes_dot(f & 0xF0F0F0F0, x_high, high, WARPS, K_WIDTH)
        words = ahead

    y = tl.sum(low, axis=0) + (tl.sum(high, axis=0) >> 4)
    hi, lo = tl.split(y.reshape(8 * ROW_GROUPS, COLUMNS // 2, 2))
    y = hi.to(tl.float32) * 256.0 + lo.to(tl.float32)
    row = program * (8 * ROW_GROUPS) + tl.arange(0, 8 * ROW_GROUPS)[:, None]
    token = (tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2))[None, :]
    s = tl.load(step_ptr + token * 2, mask=token < num_tokens, other=0.0)
    offset = tl.load(step_ptr + token * 2 + 1, mask=token < num_tokens, other=0.0)
    y = (y * s + offset) * (tl.load(_choose(member, scale_ptrs)) * 0.5)
    offsets = token.to(tl.int64) * rows + row
    mask = (row < rows) & (token < num_tokens)
    if HAS_ADD:
        y += tl.load(_choose(member, add_ptrs) + offsets, mask=mask, other=0.0)
    y_ptr = _choose(member, y_ptrs)
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
