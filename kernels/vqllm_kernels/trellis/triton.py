"""Kernels of trellis-v1 and trellis-v2: decode, and a decode-matmul for up to 64 tokens.

A lane decodes a tile, or a part of its rows (see `tiles`), from packed codes as they are stored: 16
bytes a load where the rate is a multiple of half a bit (of a bit, with tiles of 64 rows), no
shuffles, no shared memory. There are two ways to multiply.

Codes whose values are sums of bytes (1mad, mul1, mul2, bytes4, bytes2) go to int8 tensor cores: the
product of a state and the multiplier is, as it stands in its register, four (V = 1) or two times
two (V = 2) int8 operands, and the activations, in two bytes of 8 bits each (`activations`), are
repeated along k. A state costs a shift, a mask and a multiplication; bytes read as unsigned one
more operation. Sums are exact integers.

All other codes are looked up as float16 in the table of values of their states (trellis-v2 in the
dtype of x), or computed (3inst), and go to float16 or bfloat16 tensor cores.

Warps, and programs, split the columns of W. Each program writes its sums, and a second kernel adds
them up, always in the same order: results are deterministic.

Static figures for sm_90 at up to 4 tokens, tiles of 64 rows (tests/parity/budgets.json): 2.05
instructions a weight for bytes2 at 2 bits, 3.6 for bytes4 at 3 and 4 bits, 4.6 for mul1, 7.1 for
3inst, 4.2 for a hybrid and 5.9 for trellis-v2, whose bound is their look-ups. Of the 2.05, shifts
and masks are 1.1, on half as many units: 14·10^12 weights a second on an H100, where 2-bit codes
arrive at 12·10^12.
"""

import triton
import triton.language as tl

from vqllm_kernels import members
from vqllm_kernels.trellis import tiles

_chunks = tiles.load_chunks
_words = tiles.words_of
_in_order = tiles.in_order
_pair_states = tiles.pair_states
_pair_values = tiles.pair_values
_bytes = tiles.bytes_of
_stack = tiles.stack
_columns = tiles.columns
_choose = members.choose
_locate = members.locate
_total = members.total


@triton.jit
def _first_word(part, tile_row, tile_col, tiles_c, NUM_WORDS: tl.constexpr, PARTS: tl.constexpr):
    """Offset in the codes of a lane's first word."""
    tile = (tile_row.to(tl.int64) * tiles_c + tile_col) * NUM_WORDS
    return tile + part * (NUM_WORDS // PARTS)


@triton.jit
def _word_before(part, tile_row, tile_col, tiles_c, NUM_WORDS: tl.constexpr, PARTS: tl.constexpr):
    """Offset of the word before that, around the ring."""
    tile = (tile_row.to(tl.int64) * tiles_c + tile_col) * NUM_WORDS
    return tile + tl.where(part == 0, NUM_WORDS, part * (NUM_WORDS // PARTS)) - 1


@triton.jit
def matmul_kernel(
    x_ptr,  # int32 [X_PARTS · num_tokens, x_words] of 4 int8, or DTYPE [num_tokens, cols]
    codes_ptrs,  # int32 [tiles_r, tiles_c, NUM_WORDS] of each member
    table_ptrs,  # float16 [2^L, V] of each member, or unused
    partial_ptr,  # float32 [splits, num_tokens, rows of all members]
    num_tokens,
    every_rows,  # rows of each member
    cols,
    tiles_c,
    split_steps,
    NUM_WORDS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    L: tl.constexpr,
    V: tl.constexpr,
    MODE: tl.constexpr,  # "bytes", "3inst" or "table"
    MULTIPLIER: tl.constexpr,
    ADDEND: tl.constexpr,
    FLIP: tl.constexpr,
    MEAN: tl.constexpr,
    X_PARTS: tl.constexpr,  # columns of the product a token
    PARTS: tl.constexpr,
    WARPS: tl.constexpr,
    TOKEN_GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    K_WIDTH: tl.constexpr,
):
    LANES: tl.constexpr = WARPS * 32
    K_WARPS: tl.constexpr = WARPS // PARTS
    TILE_COLS: tl.constexpr = 256 // TILE_ROWS
    OWN: tl.constexpr = NUM_WORDS // PARTS
    PART_ROWS: tl.constexpr = TILE_ROWS // PARTS
    HALF: tl.constexpr = PART_ROWS // 2
    STEPS: tl.constexpr = TILE_COLS // V
    TOKENS: tl.constexpr = 8 * TOKEN_GROUPS
    BYTES: tl.constexpr = MODE == "bytes"
    ACC: tl.constexpr = tl.int32 if BYTES else tl.float32
    TILE_BITS: tl.constexpr = NUM_WORDS * 32
    TILE_STEPS: tl.constexpr = 256 // V

    member, program, rows_before = _locate(tl.program_id(0), every_rows, 8 * TILE_ROWS)
    codes_ptr = _choose(member, codes_ptrs)
    rows = _choose(member, every_rows)
    tiles_r = tl.cdiv(rows, TILE_ROWS)
    lane = tl.arange(0, LANES)
    part = lane // (K_WARPS * 32)
    tile_row = program * 8 + lane // 4 % 8
    place = lane // 32 % K_WARPS * 4 + lane % 4
    lane_x = tl.arange(0, TOKEN_GROUPS * LANES)
    token = tl.program_id(2) * TOKENS + lane_x // LANES * 8 + lane_x // 4 % 8
    place_x = lane_x // 32 % K_WARPS * 4 + lane_x % 4

    first = tl.program_id(1) * split_steps * (K_WARPS * 4)
    last = tl.minimum(first + split_steps * (K_WARPS * 4), tiles_c)
    if MODE == "table":
        table_ptr = _choose(member, table_ptrs)
    acc = ()
    for _ in tl.static_range(HALF):
        acc = acc + (tl.zeros((WARPS, 16, TOKENS), ACC),)

    valid = (tile_row < tiles_r) & (first + place < last)
    own = _first_word(part, tile_row, first + place, tiles_c, NUM_WORDS, PARTS)
    chunks = _chunks(codes_ptr + own, valid, OWN, CHUNK)
    for start in tl.range(first, last, K_WARPS * 4, num_stages=1):
        words = _words(chunks, OWN, CHUNK)
        if PARTS == 1:
            before = words[OWN - 1]
        else:
            inside = (tile_row < tiles_r) & (start + place < last)
            at = _word_before(part, tile_row, start + place, tiles_c, NUM_WORDS, PARTS)
            before = _in_order(tl.load(codes_ptr + at, mask=inside, other=0))
        # The next step's codes are on their way while these are decoded.
        ahead = start + K_WARPS * 4 + place
        own = _first_word(part, tile_row, ahead, tiles_c, NUM_WORDS, PARTS)
        chunks = _chunks(codes_ptr + own, (tile_row < tiles_r) & (ahead < last), OWN, CHUNK)
        col = (start + place_x) * TILE_COLS
        inside_x = (start + place_x < last)[:, None]
        if BYTES:
            x_words = tiles_c * (TILE_COLS // 4)
            j = tl.arange(0, TILE_COLS // 4)[None, :]
            x_at = token[:, None].to(tl.int64) * x_words + (col // 4)[:, None] + j
            mask = inside_x & (token < X_PARTS * num_tokens)[:, None]
            x4 = tl.load(x_ptr + x_at, mask=mask, other=0).to(tl.uint32, bitcast=True)
            x4 = _columns(x4, TILE_COLS // 4)
            pieces = ()
            for c in tl.static_range(STEPS):
                if V == 1:
                    pieces = pieces + (((x4[c // 4] >> (c % 4 * 8)) & 0xFF) * 0x01010101,)
                else:
                    pieces = pieces + (((x4[c // 2] >> (c % 2 * 16)) & 0xFFFF) * 0x00010001,)
            x = _bytes(_stack(pieces, STEPS).reshape(TOKEN_GROUPS * LANES, STEPS))
            RUN: tl.constexpr = 4 * STEPS
        else:
            j = tl.arange(0, TILE_COLS)[None, :]
            x_at = token[:, None].to(tl.int64) * cols + col[:, None] + j
            mask = inside_x & (token < num_tokens)[:, None] & (col[:, None] + j < cols)
            x = tl.load(x_ptr + x_at, mask=mask, other=0.0)
            RUN: tl.constexpr = TILE_COLS
        # k is (which register of the lane, lane t, what a register or two of them hold)
        x = x.reshape(TOKEN_GROUPS, WARPS, 8, 4, RUN // K_WIDTH, K_WIDTH)
        x = x.permute(1, 4, 3, 5, 0, 2).reshape(WARPS, 4 * RUN, TOKENS)

        sums = ()
        for i in tl.static_range(HALF):
            if MODE == "table":
                w = _pair_values(
                    words, before, table_ptr, i, HALF, STEPS, TILE_BITS, TILE_STEPS, L, V,
                    False, 0, 0, False,
                )  # fmt: skip
                w = w.to(x_ptr.dtype.element_ty)
            else:
                state = _pair_states(words, before, i, HALF, STEPS, TILE_BITS, TILE_STEPS, L)
                if BYTES:
                    product = state * MULTIPLIER
                    if ADDEND != 0:
                        product = product + ADDEND
                    if FLIP:
                        product = product ^ 0x80808080
                    w = _bytes(product)
                else:
                    y = state * 89226354 + 64248484
                    y = (y & 0x8FFF8FFF) ^ 0x3B603B60
                    low = (y & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
                    high = (y >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
                    w = (low + high - MEAN).to(x_ptr.dtype.element_ty)
            w = w.reshape(WARPS, 8, 4, 2, RUN // K_WIDTH, K_WIDTH)
            w = w.permute(0, 3, 1, 4, 2, 5).reshape(WARPS, 16, 4 * RUN)
            sums = sums + (tl.dot(w, x, acc[i], out_dtype=ACC),)
        acc = sums

    m = tl.arange(0, PARTS * 16)
    row = (program * 8 + m % 8) * TILE_ROWS + m // 16 * PART_ROWS + m // 8 % 2 * HALF
    row = row[:, None]
    all_rows = _total(every_rows)
    for i in tl.static_range(HALF):
        y = tl.sum(acc[i].reshape(PARTS, K_WARPS, 16, TOKENS), axis=1).reshape(PARTS * 16, TOKENS)
        if X_PARTS == 2:
            hi, lo = tl.split(y.reshape(PARTS * 16, TOKENS // 2, 2))
            y = hi.to(tl.float32) * 256.0 + lo.to(tl.float32)
        elif X_PARTS == 4:
            even, odd = tl.split(y.reshape(PARTS * 16, TOKENS // 4, 2, 2))
            part0, part2 = tl.split(even)
            part1, part3 = tl.split(odd)
            y = part0.to(tl.float32) * 256.0 + part1.to(tl.float32)
            y = (y * 256.0 + part2.to(tl.float32)) * 256.0 + part3.to(tl.float32)
        n = tl.program_id(2) * (TOKENS // X_PARTS) + tl.arange(0, TOKENS // X_PARTS)[None, :]
        at = (tl.program_id(1).to(tl.int64) * num_tokens + n) * all_rows + rows_before + row + i
        tl.store(partial_ptr + at, y, mask=(row + i < rows) & (n < num_tokens))


@triton.jit
def finish_kernel(
    partial_ptr,  # float32 [splits, num_tokens, rows of all members]
    scale_ptrs,  # float32 [1] of each member
    step_ptr,  # float32 [num_tokens, 2] of `activations`, or unused
    add_ptrs,  # float32 [num_tokens, rows] of each member, or unused
    y_ptrs,  # [num_tokens, rows] of each member
    num_tokens,
    every_rows,  # rows of each member
    splits,
    factor,
    BYTES: tl.constexpr,
    HAS_ADD: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(1)
    member, program, rows_before = _locate(tl.program_id(0), every_rows, BLOCK)
    rows = _choose(member, every_rows)
    all_rows = _total(every_rows)
    row = program * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    at = token.to(tl.int64) * rows + row
    # of the piece: its rows are those of all members
    at_piece = token.to(tl.int64) * all_rows + rows_before + row
    # All pieces at once, or 32: one after the other each waits for its load.
    y = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, splits, PIECES):
        # pieces: [PIECES, BLOCK]
        s = (start + tl.arange(0, PIECES))[:, None]
        pieces = partial_ptr + s.to(tl.int64) * num_tokens * all_rows + at_piece[None, :]
        y += tl.sum(tl.load(pieces, mask=(s < splits) & mask[None, :], other=0.0), axis=0)
    if BYTES:
        y = y * tl.load(step_ptr + token * 2) + tl.load(step_ptr + token * 2 + 1)
    y = y * (tl.load(_choose(member, scale_ptrs)) * factor)
    if HAS_ADD:
        y += tl.load(_choose(member, add_ptrs) + at, mask=mask, other=0.0)
    y_ptr = _choose(member, y_ptrs)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def decode_kernel(
    codes_ptr,  # int32 [tiles_r, tiles_c, NUM_WORDS]
    table_ptr,  # float32: values by sum of bytes [V, entries] or by state [2^L, V]
    scale_ptr,  # float32 [1]
    add_ptr,  # float32 [rows, cols], or unused
    W_ptr,  # [rows, cols]
    rows,
    cols,
    tiles_r,
    tiles_c,
    NUM_WORDS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    L: tl.constexpr,
    V: tl.constexpr,
    BY_SUM: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    ADDEND: tl.constexpr,
    FLIP: tl.constexpr,
    PARTS: tl.constexpr,
    WARPS: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_ADD: tl.constexpr,
):
    LANES: tl.constexpr = WARPS * 32
    K_WARPS: tl.constexpr = WARPS // PARTS
    TILE_COLS: tl.constexpr = 256 // TILE_ROWS
    OWN: tl.constexpr = NUM_WORDS // PARTS
    PART_ROWS: tl.constexpr = TILE_ROWS // PARTS
    HALF: tl.constexpr = PART_ROWS // 2
    STEPS: tl.constexpr = TILE_COLS // V
    TILE_BITS: tl.constexpr = NUM_WORDS * 32
    TILE_STEPS: tl.constexpr = 256 // V

    lane = tl.arange(0, LANES)
    part = lane // (K_WARPS * 32)
    tile_row = tl.program_id(1) * 8 + lane // 4 % 8
    tile_col = tl.program_id(0) * (K_WARPS * 4) + lane // 32 % K_WARPS * 4 + lane % 4
    valid = (tile_row < tiles_r) & (tile_col < tiles_c)
    own = _first_word(part, tile_row, tile_col, tiles_c, NUM_WORDS, PARTS)
    words = _words(_chunks(codes_ptr + own, valid, OWN, CHUNK), OWN, CHUNK)
    at = _word_before(part, tile_row, tile_col, tiles_c, NUM_WORDS, PARTS)
    before = _in_order(tl.load(codes_ptr + at, mask=valid, other=0))
    scale = tl.load(scale_ptr)
    half = tl.arange(0, 2)[None, :, None]
    col = (tile_col * TILE_COLS)[:, None, None] + tl.arange(0, TILE_COLS)[None, None, :]
    for i in tl.static_range(HALF):
        W = _pair_values(
            words, before, table_ptr, i, HALF, STEPS, TILE_BITS, TILE_STEPS, L, V,
            BY_SUM, MULTIPLIER, ADDEND, FLIP,
        )  # fmt: skip
        W = W * scale
        row = (tile_row * TILE_ROWS + part * PART_ROWS + i)[:, None, None] + half * HALF
        at = row.to(tl.int64) * cols + col
        mask = (row < rows) & (col < cols)
        if HAS_ADD:
            W += tl.load(add_ptr + at, mask=mask, other=0.0)
        tl.store(W_ptr + at, W.to(W_ptr.dtype.element_ty), mask=mask)
