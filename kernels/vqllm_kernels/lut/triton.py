"""Kernels of lut-v1: decode, and a decode-matmul for up to 64 tokens. Every tile and index width.

An index is looked up in the table where it lies: one load of a whole entry (16 bytes for 8
weights), which is already the operand of a tensor core when the entry runs along the columns, tile
(1, d); entries along the rows, tile (v, 1), need one permutation for two weights.

The loads bound the speed, not the arithmetic. A table of 256 entries of 8 weights (4 KB) stays in
the first-level cache, one of 4096 (64 KB) does at best, one of 65536 (1 MB) lives in the second
level, where each index of two bytes drags in a sector of 32: do not expect such a table to be
faster than float16 weights. Sizes that are no powers of two are padded in registers: a tile of 6
costs what a tile of 8 costs, and its entries are loaded in pieces of 4 bytes.

Index widths of 8, 12 and 16 bits are loaded 16 bytes a lane and cut up in registers; other widths,
and rows that do not begin at a multiple of 4 bytes, are loaded byte by byte.
"""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqllm_kernels import fragments, gpu
from vqllm_kernels.choice import Call
from vqllm_kernels.formats import FormatSpec
from vqllm_kernels.lut.spec import LutSpec

MAX_ENTRY = 16
"""Weights of a tile, padded to powers of two, that are looked up at once."""

MAX_GROUPS = 32
"""Groups of 8 rows times groups of 8 tokens of a program: 2 registers each for the sums."""

_lanes = fragments.lanes
_pick = fragments.pick
_dot = fragments.dot


@triton.jit
def _index_at(row_ptrs, j, valid, row_bytes, BITS: tl.constexpr):
    """Index j of a packed row, byte by byte: int32, shaped as j."""
    bit = j * BITS
    byte = bit >> 3
    code = tl.load(row_ptrs + byte, mask=valid, other=0).to(tl.int32)
    if BITS > 8 or 8 % BITS != 0:
        in_row = valid & (byte + 1 < row_bytes)
        code |= tl.load(row_ptrs + byte + 1, mask=in_row, other=0).to(tl.int32) << 8
    if BITS > 8 and BITS % 8 != 0:
        in_row = valid & (byte + 2 < row_bytes)
        code |= tl.load(row_ptrs + byte + 2, mask=in_row, other=0).to(tl.int32) << 16
    return (code >> (bit & 7)) & ((1 << BITS) - 1)


@triton.jit
def _index_in(q0, q1, q2, i: tl.constexpr, BITS: tl.constexpr):
    """Index i of a lane's words, 4 in each of q0, q1, q2 [L, 4]: int32 [L]."""
    WORD: tl.constexpr = i * BITS // 32
    SHIFT: tl.constexpr = i * BITS % 32
    q = q0 if WORD < 4 else (q1 if WORD < 8 else q2)
    code = _pick(q, WORD % 4) >> SHIFT
    if SHIFT + BITS > 32:
        q = q0 if WORD + 1 < 4 else (q1 if WORD + 1 < 8 else q2)
        code |= _pick(q, (WORD + 1) % 4) << (32 - SHIFT)
    return (code & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def _load_quads(ptrs, j, rows_valid, row_words, QUADS: tl.constexpr):
    """1 or 3 loads of 16 bytes a lane, uint32 [L, 4] each; row_words is a multiple of 4·QUADS."""
    q0 = tl.load(ptrs, mask=rows_valid & (j < row_words), other=0, eviction_policy="evict_first")
    q0 = q0.to(tl.uint32, bitcast=True)
    q1, q2 = q0, q0
    if QUADS == 3:
        mask = rows_valid & (j + 4 < row_words)
        q1 = tl.load(ptrs + 4, mask=mask, other=0, eviction_policy="evict_first")
        mask = rows_valid & (j + 8 < row_words)
        q2 = tl.load(ptrs + 8, mask=mask, other=0, eviction_policy="evict_first")
        q1, q2 = q1.to(tl.uint32, bitcast=True), q2.to(tl.uint32, bitcast=True)
    return q0, q1, q2


@triton.jit
def _piece(ptrs, i: tl.constexpr, NUM: tl.constexpr):
    """Element i of each entry, or zero from NUM on: [L]."""
    return tl.load(ptrs + i) if i < NUM else tl.zeros_like(tl.load(ptrs))


@triton.jit
def _pieces2(ptrs, i: tl.constexpr, STEP: tl.constexpr, NUM: tl.constexpr):
    return tl.join(_piece(ptrs, i, NUM), _piece(ptrs, i + STEP, NUM))


@triton.jit
def _pieces4(ptrs, i: tl.constexpr, STEP: tl.constexpr, NUM: tl.constexpr):
    even = _pieces2(ptrs, i, 2 * STEP, NUM)
    return tl.join(even, _pieces2(ptrs, i + STEP, 2 * STEP, NUM)).reshape(ptrs.shape[0], 4)


@triton.jit
def _pieces8(ptrs, i: tl.constexpr, STEP: tl.constexpr, NUM: tl.constexpr):
    even = _pieces4(ptrs, i, 2 * STEP, NUM)
    return tl.join(even, _pieces4(ptrs, i + STEP, 2 * STEP, NUM)).reshape(ptrs.shape[0], 8)


@triton.jit
def _pieces(ptrs, NUM: tl.constexpr):
    """The NUM <= 8 elements of each entry, one load each, padded to a power of two: [L, ..]."""
    if NUM == 1:
        pieces = tl.load(ptrs)[:, None]
    elif NUM == 2:
        pieces = _pieces2(ptrs, 0, 1, NUM)
    elif NUM <= 4:
        pieces = _pieces4(ptrs, 0, 1, NUM)
    else:
        pieces = _pieces8(ptrs, 0, 1, NUM)
    return pieces


@triton.jit
def _entry(codebook_ptr, index, V: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr):
    """Entries of the table, float16 [L, SIZE], padded with zeros to powers of two in V and D."""
    e = tl.arange(0, SIZE)[None, :]
    E: tl.constexpr = V * D
    PAD_D: tl.constexpr = triton.next_power_of_2(D)
    if E == SIZE and SIZE <= 8:
        entry = tl.load(codebook_ptr + index[:, None] * SIZE + e)
    elif E == SIZE and SIZE == 16:
        ptrs = codebook_ptr + index[:, None] * SIZE + tl.arange(0, 8)[None, :]
        entry = tl.join(tl.load(ptrs), tl.load(ptrs + 8)).permute(0, 2, 1)
        entry = entry.reshape(index.shape[0], SIZE)
    elif D == PAD_D and E % 2 == 0 and E <= 16:
        # Entries are not aligned to their size. Loaded as [L, SIZE] they would be spread over
        # several lanes; as pieces of 4 bytes all of an entry stays in its lane.
        pairs = _pieces(codebook_ptr.to(tl.pointer_type(tl.uint32)) + index * (E // 2), E // 2)
        low = (pairs & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
        high = (pairs >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
        entry = tl.join(low, high).reshape(index.shape[0], SIZE)
    elif D == PAD_D and E <= 8:
        entry = _pieces(codebook_ptr + index * E, E)
    else:
        v, d = e // PAD_D, e % PAD_D
        offsets = index[:, None] * E + v * D + d
        entry = tl.load(codebook_ptr + offsets, mask=(v < V) & (d < D), other=0.0)
    return entry


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
                    index = _index_at(
                        row_ptrs, at, tile_valid & (at * D < cols), row_words, BITS
                    )
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


def tiling(x_NC: Tensor, spec: LutSpec, rows: int) -> dict[str, int]:
    """Tile sizes of the matmul: tokens and rows of tiles in groups of 8, and warps; as for e8p."""
    pad_v = triton.next_power_of_2(spec.tile_rows)
    token_groups = min(fragments.token_groups(x_NC), MAX_GROUPS // pad_v)
    few = rows < 32 * 2 * gpu.num_multiprocessors(x_NC.device) or x_NC.dtype == torch.float32
    return {
        "TOKEN_GROUPS": token_groups,
        "TILE_GROUPS": max(1, (2 if few else 4) // pad_v),
        "WARPS": 8 if token_groups <= 2 else 4,
    }


def declines(call: Call) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    spec = call.spec
    assert isinstance(spec, LutSpec)
    pad_v, pad_d = map(triton.next_power_of_2, spec.tile)
    if pad_v * pad_d > MAX_ENTRY:
        return f"a tile of {spec.tile} has more than {MAX_ENTRY} weights"
    if call.operation == "matmul" and spec.tile_cols not in (1, 2, 4, 8):
        return f"a tile is {spec.tile_cols} columns wide, not 1, 2, 4 or 8"
    return None


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
        tensors: `codes` and `codebook` as in `spec.layout(rows, cols)`.
        add_NR: float32 [N, rows].
    """
    assert isinstance(spec, LutSpec)
    x_NC, codes = x_NC.contiguous(), tensors["codes"].contiguous()
    y_NR = torch.empty(len(x_NC), rows, dtype=dtype, device=x_NC.device)
    if y_NR.numel() == 0:
        return y_NR
    bits = spec.index_bits
    by_word = bits in (8, 12, 16) and codes.shape[1] % 4 == 0 and codes.data_ptr() % 4 == 0
    if by_word:
        codes = codes.view(torch.int32)
    padded = triton.next_power_of_2(spec.tile_rows) != spec.tile_rows
    word_unit, col_unit = gcd(codes.shape[1], fragments.WORD_UNIT), gcd(cols, fragments.COL_UNIT)
    tile = tiling(x_NC, spec, rows)
    grid = (
        triton.cdiv(len(codes), 8 * tile["TILE_GROUPS"]),
        triton.cdiv(len(x_NC), 8 * tile["TOKEN_GROUPS"]),
    )
    matmul_kernel[grid](
        x_NC,
        codes,
        tensors["codebook"].contiguous(),
        x_NC if add_NR is None else add_NR,
        y_NR,
        len(x_NC),
        rows,
        cols // col_unit,
        len(codes),
        codes.shape[1] // word_unit,
        V=spec.tile_rows,
        D=spec.tile_cols,
        BITS=bits,
        BY_WORD=by_word,
        WORD_UNIT=word_unit,
        COL_UNIT=col_unit,
        HAS_ADD=add_NR is not None,
        **tile,
        K_WIDTH=fragments.k_width(
            joined=spec.tile_cols < 8 or padded,
            narrow=not by_word or (padded and spec.tile_rows * spec.tile_cols % 2 == 0),
        ),
        num_warps=tile["WARPS"],
        num_stages=1,
        maxnreg=168 if x_NC.dtype == torch.float32 else None,  # spills without a limit
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
    assert isinstance(spec, LutSpec)
    codes = tensors["codes"].contiguous()
    W_RC = torch.empty(rows, cols, dtype=dtype, device=codes.device)
    if W_RC.numel() == 0:
        return W_RC
    num_tile_rows, num_tile_cols = spec.grid(rows, cols)
    col_unit = gcd(cols, fragments.COL_UNIT)
    block_rows, block_codes = 4, 64
    grid = (triton.cdiv(num_tile_cols, block_codes), triton.cdiv(num_tile_rows, block_rows))
    decode_kernel[grid](
        codes,
        tensors["codebook"].contiguous(),
        codes if add_RC is None else add_RC,
        W_RC,
        rows,
        cols // col_unit,
        codes.shape[1],
        V=spec.tile_rows,
        D=spec.tile_cols,
        BITS=spec.index_bits,
        COL_UNIT=col_unit,
        HAS_ADD=add_RC is not None,
        BLOCK_ROWS=block_rows,
        BLOCK_CODES=block_codes,
        enable_fp_fusion=True,
    )
    return W_RC
