"""Activations as integers of 16 or 32 bits in signed bytes, for products on int8 tensor cores.

A token x becomes x ≈ s (256 hi + lo) with hi, lo in −128..127 and s = max |x| / 32512. The
rounding error is at most s / 2: for Gaussian activations, which is what a Hadamard transform
leaves, a root mean square of 4·10⁻⁵, a quarter of float16's. float32 activations take four bytes,
s = max |x| / (127 · 2²⁴); with three, the rounding error is that of torch's product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqllm_kernels.kernels import Quantized, Wanted

PARTS = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4}
"""Bytes of an activation by its type."""
LEVELS = {2: 127 << 8, 4: 127 << 24}
"""The largest integer by the number of bytes."""


@triton.jit
def step_of(amax, LEVELS: tl.constexpr):
    """s of a token and its reciprocal, which is 0 where it could overflow: such a token is 0."""
    return amax / LEVELS, tl.where(amax > 1e-30, LEVELS / tl.maximum(amax, 1e-30), 0.0)


@triton.jit
def integers_of(x, inverse):
    return tl.floor(x * inverse + 0.5).to(tl.int32)


@triton.jit
def store_bytes(out, q, stride, mask, PARTS: tl.constexpr):
    """Stores the bytes of q, the highest at `out`, each of the others `stride` further on."""
    # From the lowest on, so that each lies in -128..127 and what is left is exact.
    for i in tl.static_range(PARTS):
        part = ((q + 128) & 0xFF) - 128
        q = (q - part) >> 8
        tl.store(out + (PARTS - 1 - i) * stride, part.to(tl.int8), mask=mask)


@triton.jit
def quantize_kernel(
    x_ptr,  # [num_tokens, cols]
    q_ptr,  # int8 [num_tokens, PARTS, padded_cols], the highest first; the padding is written as 0
    step_ptr,  # float32 [num_tokens, 2]: s, and s times the sum of the integers times offset
    cols,
    padded_cols,
    factor0,
    factor1,
    offset0,
    offset1,
    BIT: tl.constexpr,
    PARTS: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantizes x times a factor, one program a token. A NaN or an infinity makes s NaN.

    Factors and offsets are those of columns without and with BIT in their number.
    """
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    factor = tl.where((c & BIT) == 0, factor0, factor1)
    offset = tl.where((c & BIT) == 0, offset0, offset1)
    most = tl.zeros((BLOCK,), tl.float32)
    poison = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, cols, BLOCK):
        x = tl.load(x_ptr + token * cols + start + c, mask=start + c < cols, other=0.0)
        x = x.to(tl.float32) * factor
        most = tl.maximum(most, tl.abs(x))
        poison += x * 0.0
    step, inverse = step_of(tl.max(most, axis=0), LEVELS)
    step += tl.sum(poison, axis=0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, padded_cols, BLOCK):
        x = tl.load(x_ptr + token * cols + start + c, mask=start + c < cols, other=0.0)
        q = integers_of(x.to(tl.float32) * factor, inverse)
        out = q_ptr + token * PARTS * padded_cols + start + c
        store_bytes(out, q, padded_cols, start + c < padded_cols, PARTS)
        total += q.to(tl.float32) * offset
    tl.store(step_ptr + token * 2, step)
    tl.store(step_ptr + token * 2 + 1, step * tl.sum(total, axis=0))


def empty(num_tokens: int, wanted: Wanted, dtype: torch.dtype, device: torch.device) -> Quantized:
    """Room for tokens of `dtype`."""
    size = (num_tokens, PARTS[dtype], wanted.padded_cols // 4)
    return Quantized(
        words=torch.empty(size, dtype=torch.int32, device=device),
        step=torch.empty(num_tokens, 2, dtype=torch.float32, device=device),
        dtype=dtype,
    )


def quantized(x_NC: Tensor, wanted: Wanted) -> Quantized:
    """Activations float16, bfloat16 or float32 [N, cols] as bytes."""
    x_NC = x_NC.contiguous()
    num_tokens, cols = x_NC.shape
    out = empty(num_tokens, wanted, x_NC.dtype, x_NC.device)
    quantize_kernel[(num_tokens,)](
        x_NC,
        out.words.view(torch.int8),
        out.step,
        cols,
        wanted.padded_cols,
        *wanted.factors,
        *wanted.offsets,
        BIT=wanted.bit,
        PARTS=out.parts,
        LEVELS=LEVELS[out.parts],
        BLOCK=min(triton.next_power_of_2(wanted.padded_cols), 8192),
        num_warps=8,
        enable_fp_fusion=True,
    )
    return out
