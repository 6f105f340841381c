"""Activations as integers of 16 or 32 bits in signed bytes, for products on int8 tensor cores.

A token x becomes x ≈ s (256 hi + lo) with hi, lo in −128..127 and s = max |x| / 32512. The
rounding error is at most s / 2: for Gaussian activations, which is what a Hadamard transform
leaves, a root mean square of 4·10⁻⁵, a quarter of float16's. float32 activations take four bytes,
s = max |x| / (127 · 2²⁴); with three, the rounding error is that of torch's product.
"""

import torch
import triton
import triton.language as tl

PARTS = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4}
"""Bytes of an activation by its type."""
LEVELS = {2: 127 << 8, 4: 127 << 24}
"""The largest integer by the number of bytes."""


@triton.jit
def quantize_kernel(
    x_ptr,  # [num_tokens, cols]
    q_ptr,  # int8 [num_tokens, PARTS, padded_cols], the highest first; the padding is written as 0
    step_ptr,  # float32 [num_tokens, 2]: s, and s times the sum of the integers times offset
    cols,
    padded_cols,
    even_factor,
    odd_factor,
    even_offset,
    odd_offset,
    PARTS: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantizes x times a factor, one program a token. A NaN or an infinity makes s NaN.

    Factors and offsets are those of even and odd columns.
    """
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    is_odd = (c & 1) == 1
    factor = tl.where(is_odd, odd_factor, even_factor)
    offset = tl.where(is_odd, odd_offset, even_offset)
    most = tl.zeros((BLOCK,), tl.float32)
    poison = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, cols, BLOCK):
        x = tl.load(x_ptr + token * cols + start + c, mask=start + c < cols, other=0.0)
        x = x.to(tl.float32) * factor
        most = tl.maximum(most, tl.abs(x))
        poison += x * 0.0
    amax = tl.max(most, axis=0)
    # Below 1e-30 the reciprocal could overflow; such a token is 0.
    inverse = tl.where(amax > 1e-30, LEVELS / tl.maximum(amax, 1e-30), 0.0)
    step = amax / LEVELS + tl.sum(poison, axis=0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, padded_cols, BLOCK):
        x = tl.load(x_ptr + token * cols + start + c, mask=start + c < cols, other=0.0)
        q = tl.floor(x.to(tl.float32) * factor * inverse + 0.5).to(tl.int32)
        inside = start + c < padded_cols
        out = q_ptr + token * PARTS * padded_cols + start + c
        # From the lowest on, so that each lies in -128..127 and what is left is exact.
        rest = q
        for i in tl.static_range(PARTS):
            part = ((rest + 128) & 0xFF) - 128
            rest = (rest - part) >> 8
            tl.store(out + (PARTS - 1 - i) * padded_cols, part.to(tl.int8), mask=inside)
        total += q.to(tl.float32) * offset
    tl.store(step_ptr + token * 2, step)
    tl.store(step_ptr + token * 2 + 1, step * tl.sum(total, axis=0))
