"""Tiles of decoded weights that are tensor-core operands without leaving the registers.

The lanes of a warp hold an operand of `mma.m16n8k16` in a fixed pattern: with lane = 4·g + t, lane
(g, t) has row g and row g + 8 of the 16, and of the 16 values of k those with k // 2 % 4 == t. The
order of k is ours to choose, if both operands take the same. So a lane may as well have a run of
consecutive columns of row g, which is what it gets when it loads 16 bytes of packed codes:

    lane (g, t)    codes of row g: 16 consecutive bytes, the bytes of lanes t = 0..3 side by side
                   x of token g:   16 consecutive bytes at the same columns

Nothing is shuffled and nothing goes through shared memory: packed codes are loaded into registers,
decoded there, and multiplied. The compiler finds these layouts if tensors are indexed

    [groups of 8 rows, warp, g = 8, t = 4, columns of a lane]

because its default for 16-byte loads gives the lanes to the last two dimensions before the columns
and the warps to the next. Warps split the columns of W (a batch dimension of the product), and
their sums are added once at the end, always in the same order, so results are deterministic.
"""

import triton
import triton.language as tl


@triton.jit
def pick(pieces, i: tl.constexpr, NUM: tl.constexpr):
    """Entry i of the last dimension (NUM of them, all in one lane): a choice of registers."""
    return tl.sum(tl.where(tl.arange(0, NUM) == i, pieces, 0), axis=len(pieces.shape) - 1)


@triton.jit
def dot(w, x, acc, WARPS: tl.constexpr, PER_LANE: tl.constexpr):
    """acc + W xᵀ for one piece of columns.

    Args:
        w: [G, WARPS, 8, 4, PER_LANE] weights, G groups of 8 rows (an even number).
        x: [H, WARPS, 8, 4, PER_LANE] activations, H groups of 8 tokens, the same dtype; the
            columns of a lane may stand in any order that is that of `w`.
        acc: float32 [WARPS, 8·G, 8·H].
    """
    G: tl.constexpr = w.shape[0]
    H: tl.constexpr = x.shape[0]
    if w.dtype.primitive_bitwidth == 16:
        # Two k a register, lanes next, then the second register.
        QUADS: tl.constexpr = PER_LANE // 4
        w = w.reshape(G, WARPS, 8, 4, QUADS, 2, 2).permute(1, 0, 2, 4, 5, 3, 6)
        x = x.reshape(H, WARPS, 8, 4, QUADS, 2, 2).permute(1, 4, 5, 3, 6, 0, 2)
    else:
        w = w.permute(1, 0, 2, 4, 3)
        x = x.permute(1, 4, 3, 0, 2)
    w = w.reshape(WARPS, 8 * G, 4 * PER_LANE)
    x = x.reshape(WARPS, 4 * PER_LANE, 8 * H)
    if w.dtype.primitive_bitwidth == 16:
        acc = tl.dot(w, x, acc)
    else:
        # Decoded weights are exact in tf32 (11 bits); a float32 is the sum of two tf32 numbers.
        high = (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
        acc = tl.dot(w, high, acc, input_precision="tf32")
        acc = tl.dot(w, x - high, acc, input_precision="tf32")
    return acc


@triton.jit
def load_x(x_ptr, k, k_valid, num_tokens, stride, H: tl.constexpr):
    """Activations [H, WARPS, 8, 4, PER_LANE] at the columns k [1, WARPS, 1, 4, PER_LANE].

    Tokens from `num_tokens` on and columns where `k_valid` is false are zero.
    """
    h = tl.arange(0, H)[:, None, None, None, None]
    g = tl.arange(0, 8)[None, None, :, None, None]
    token = h * 8 + g
    offsets = token.to(tl.int64) * stride + k
    return tl.load(x_ptr + offsets, mask=(token < num_tokens) & k_valid, other=0.0)
