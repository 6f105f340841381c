"""Kernels of the Hadamard transform with random signs and scales, for every order.

Signs, and scales that stand before an input's transform or after an output's, are one factor a
feature, computed once.

Up to order 128 a transform is one product with the whole matrix, 16 blocks a program. Above, the
Kronecker factors of `matrices` are dealt out to passes, and a block is a matrix X [m, p] there:

    Y = B X S      S  the Sylvester matrix of order p <= 64, built from the parity of i & j
                   B  all other factors, a dense m x m matrix that is loaded, m <= 512

One pass is enough for nearly every size in use (4096 = 64 x 64, 11008 = 172 x 64, 28672 =
448 x 64). A program makes 32 rows of Y: it walks over X, 64 rows at a time, multiplies with S, and
with its rows of B. The work of X S is repeated by every program of a block; it is what buys
parallelism when there is only one token.

Precision: X S has exact products for all three dtypes. Its result is rounded once to tf32 (11 bits)
for 16-bit activations, which is no coarser than float16; float32 activations take three tf32
products each, about 2^-21. Sums and what passes between two passes are float32.

A transform is bound by latency, not by arithmetic or memory: 4096 features of one token are one
program and one step, 28672 are 14 programs of 7 steps.
"""

import triton
import triton.language as tl

from vqllm_kernels import activations, members

_choose = members.choose
_locate = members.locate


@triton.jit
def _times_factor(v, factor_ptr, first, row_valid, num_cols):
    """v [rows, cols] times the factors of its features.

    Args:
        first: feature of the first column, [rows, 1].
        row_valid, num_cols: rows [rows, 1] and number of columns that exist.
    """
    col = tl.arange(0, v.shape[1])[None, :]
    factor = tl.load(factor_ptr + first + col, mask=row_valid & (col < num_cols), other=0.0)
    return v * factor


@triton.jit
def _rounded(v):
    """float32 rounded to the 11 bits of tf32: the tensor core by itself drops the other 13."""
    bits = (v.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _product(a, b, IS_EXACT: tl.constexpr):
    """a b in float32: three tf32 products, or one of rounded numbers."""
    if IS_EXACT:
        c = tl.dot(a, b, input_precision="tf32x3")
    else:
        c = tl.dot(_rounded(a), _rounded(b), input_precision="tf32")
    return c


@triton.jit
def dense_kernel(
    x_ptrs,  # [blocks, order] of each member
    factor_ptrs,  # float32 [features] of each member
    matrix_ptr,  # [order, order], int8 or float32
    y_ptrs,  # [blocks, order] of each member
    every_blocks,  # blocks of each member
    every_features,  # features of each member
    order,
    scale,
    FACTOR: tl.constexpr,  # "before" or "after"
    TRANSPOSE: tl.constexpr,
    IS_EXACT: tl.constexpr,
    BLOCKS: tl.constexpr,
    PAD: tl.constexpr,
):
    member, program, _ = _locate(tl.program_id(0), every_blocks, BLOCKS)
    x_ptr = _choose(member, x_ptrs)
    factor_ptr = _choose(member, factor_ptrs)
    y_ptr = _choose(member, y_ptrs)
    num_blocks = _choose(member, every_blocks)
    blocks_per_row = _choose(member, every_features) // order
    block = (program * BLOCKS + tl.arange(0, BLOCKS))[:, None]
    col = tl.arange(0, PAD)[None, :]
    row = tl.arange(0, PAD)[:, None]
    valid = (block < num_blocks) & (col < order)
    offsets = block.to(tl.int64) * order + col
    first = block % blocks_per_row * order
    # x: [BLOCKS, PAD]
    x = tl.load(x_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    if FACTOR == "before":
        x = _times_factor(x, factor_ptr, first, block < num_blocks, order)
    # Qᵀ (or Q): [PAD, PAD]
    entry = row * order + col if TRANSPOSE else col * order + row
    Q = tl.load(matrix_ptr + entry, mask=(row < order) & (col < order), other=0).to(tl.float32)
    y = _product(x, Q, IS_EXACT) * scale
    if FACTOR == "after":
        y = _times_factor(y, factor_ptr, first, block < num_blocks, order)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _sylvester(n, PAD: tl.constexpr, DTYPE: tl.constexpr):
    """±1 Sylvester matrix of order n, zero outside: [PAD, PAD], PAD <= 256."""
    i = tl.arange(0, PAD)
    v = i[:, None] & i[None, :]
    v = v ^ (v >> 4)
    v = v ^ (v >> 2)
    v = v ^ (v >> 1)
    inside = (i < n)[:, None] & (i < n)[None, :]
    return tl.where(inside, 1.0 - 2.0 * (v & 1).to(tl.float32), 0.0).to(DTYPE)


@triton.jit
def _times_block(
    x_ptr,  # [m, post], one block
    factor_ptr,
    matrix_ptr,
    first_feature,
    i,
    col,
    m,
    post,
    num_cols,
    HAS_SYLVESTER: tl.constexpr,
    FACTOR: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    IS_EXACT: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
):
    """Rows i [rows, 1] and columns col [1, cols] of B X S."""
    X_DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    if HAS_SYLVESTER:
        S = _sylvester(post, col.shape[1], X_DTYPE)
    acc = tl.zeros((i.shape[0], col.shape[1]), tl.float32)
    for start in tl.range(0, m, BLOCK_SUM, num_stages=1):
        # X: [BLOCK_SUM, BLOCK_COLS]
        k = start + tl.arange(0, BLOCK_SUM)
        offsets = k[:, None] * post + col
        valid = (k < m)[:, None] & (col < post)
        X = tl.load(x_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        if FACTOR == "before":
            first = first_feature + k[:, None] * post
            X = _times_factor(X, factor_ptr, first, (k < m)[:, None], num_cols)
        if HAS_SYLVESTER and IS_EXACT:
            X = tl.dot(X, S.to(tl.float32), input_precision="tf32x3")
        elif HAS_SYLVESTER:
            X = tl.dot(X.to(X_DTYPE), S)
        # B: [BLOCK_ROWS, BLOCK_SUM]
        entry = k[None, :] * m + i if TRANSPOSE else i * m + k[None, :]
        B = tl.load(matrix_ptr + entry, mask=(i < m) & (k < m)[None, :], other=0).to(tl.float32)
        acc += _product(B, X, IS_EXACT)
    return acc


@triton.jit
def pass_kernel(
    x_ptrs,  # [blocks, m, post] of each member
    factor_ptrs,  # float32 [features] of each member
    matrix_ptr,  # B [m, m], int8 or float32
    y_ptrs,  # [blocks, m, post] of each member
    every_blocks,  # blocks of each member
    every_features,  # features of each member
    m,
    post,
    scale,
    HAS_SYLVESTER: tl.constexpr,  # then post is its order and one tile of columns holds it
    FACTOR: tl.constexpr,  # "before", "after" or "none"
    TRANSPOSE: tl.constexpr,
    IS_EXACT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    i = (tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    first_col = tl.program_id(2) * BLOCK_COLS
    col = (first_col + tl.arange(0, BLOCK_COLS))[None, :]
    num_cols = post - first_col
    member, block, _ = _locate(tl.program_id(0), every_blocks, 1)
    x_ptr = _choose(member, x_ptrs)
    factor_ptr = _choose(member, factor_ptrs)
    base = block.to(tl.int64) * m * post
    first_feature = (base % _choose(member, every_features)).to(tl.int32) + first_col
    acc = _times_block(
        x_ptr + base, factor_ptr, matrix_ptr, first_feature, i, col, m, post, num_cols,
        HAS_SYLVESTER, FACTOR, TRANSPOSE, IS_EXACT, BLOCK_SUM,
    )  # fmt: skip
    y = acc * scale
    offsets = i * post + col
    valid = (i < m) & (col < post)
    if FACTOR == "after":
        first = first_feature + i * post
        y = _times_factor(y, factor_ptr, first, i < m, num_cols)
    y_ptr = _choose(member, y_ptrs)
    tl.store(y_ptr + base + offsets, y.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _quantize(
    y,
    feature,
    valid,
    q_ptr,
    step_ptr,
    cols,
    padded_cols,
    factors,
    offsets,
    BIT: tl.constexpr,
    PARTS: tl.constexpr,
    LEVELS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Quantizes the features of a token, y [rows, columns], as `activations.quantize_kernel`."""
    token = tl.program_id(0).to(tl.int64)
    is_first = (feature & BIT) == 0
    y = tl.where(valid, y * tl.where(is_first, factors[0], factors[1]), 0.0)
    step, inverse = activations.step_of(tl.max(tl.abs(y)), LEVELS)
    step += tl.sum(y * 0.0)
    q = activations.integers_of(y, inverse)
    first = q_ptr + token * PARTS * padded_cols
    activations.store_bytes(first + feature, q, padded_cols, valid, PARTS)
    tail = cols + tl.arange(0, TAIL)
    zeros = tl.zeros((TAIL,), tl.int32)
    activations.store_bytes(first + tail, zeros, padded_cols, tail < padded_cols, PARTS)
    total = q.to(tl.float32) * tl.where(is_first, offsets[0], offsets[1])
    tl.store(step_ptr + token * 2, step)
    tl.store(step_ptr + token * 2 + 1, step * tl.sum(total))


@triton.jit
def quantized_pass_kernel(
    x_ptr,  # [num_tokens, m, post]
    factor_ptr,  # float32 [m · post]
    matrix_ptr,  # B [m, m], int8 or float32; several along the diagonal if there are blocks
    q_ptr,  # int8 [num_tokens, PARTS, padded_cols]
    step_ptr,  # float32 [num_tokens, 2]
    m,
    post,
    scale,
    padded_cols,
    factor0,
    factor1,
    offset0,
    offset1,
    BIT: tl.constexpr,
    PARTS: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_SYLVESTER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    COLS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """The only pass of a transform and `activations.quantize_kernel` of one token."""
    i = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    base = tl.program_id(0).to(tl.int64) * m * post
    acc = _times_block(
        x_ptr + base, factor_ptr, matrix_ptr, 0, i, col, m, post, post,
        HAS_SYLVESTER, "before", False, False, BLOCK_SUM,
    )  # fmt: skip
    valid = (i < m) & (col < post)
    _quantize(
        acc * scale, i * post + col, valid, q_ptr, step_ptr, m * post, padded_cols,
        (factor0, factor1), (offset0, offset1), BIT, PARTS, LEVELS, TAIL,
    )  # fmt: skip
