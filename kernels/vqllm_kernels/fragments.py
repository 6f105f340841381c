"""Tiles of decoded weights that are tensor-core operands without leaving the registers.

The lanes of a warp hold an operand of `mma.m16n8k16` in a fixed pattern: with lane = 4·g + t, lane
(g, t) has row g and row g + 8 of the 16, and of the 16 values of k those with k // 2 % 4 == t. The
order of k is ours to choose, if both operands take the same. So a lane may as well have a run of
consecutive columns of row g, which is what it gets when it loads 16 bytes of packed codes:

    lane (g, t)    codes of row g: 16 consecutive bytes, the bytes of lanes t = 0..3 side by side
                   x of token g:   16 consecutive bytes at the same columns

Nothing is shuffled and nothing goes through shared memory: packed codes are loaded into registers,
decoded there, and multiplied. The compiler finds these layouts by itself if the first dimension of
every tensor runs over the lanes of a program in the order

    (group of 8 rows, warp, g = 8, t = 4)

and what a lane holds is in the other dimensions. Warps split the columns of W (they are a batch
dimension of the product), and their sums are added once at the end, always in the same order, so
results are deterministic.
"""

import torch
import triton
import triton.language as tl

from vqllm_kernels.kernels import bucket

COL_UNIT = 8
WORD_UNIT = 4
"""Activations and words of codes in 16 bytes. Row lengths reach a kernel divided by their largest
common divisor with these, and are multiplied again inside: of an argument alone the compiler knows
at most that it is divisible by 16, and loads 16 bytes only from where it knows the alignment."""


@triton.jit
def lanes(GROUPS: tl.constexpr, WARPS: tl.constexpr):
    """Where the lanes of a program stand: (row of the tile, warp·4 + t), both [GROUPS·WARPS·32]."""
    lane = tl.arange(0, GROUPS * WARPS * 32)
    row = lane // (WARPS * 32) * 8 + lane // 4 % 8
    return row, lane // 32 % WARPS * 4 + lane % 4


@triton.jit
def pick(pieces, i: tl.constexpr):
    """Entry i of the last dimension, which one lane holds: a choice of registers."""
    NUM: tl.constexpr = pieces.shape[1]
    return tl.sum(tl.where(tl.arange(0, NUM)[None, :] == i, pieces, 0), axis=1)


@triton.jit
def dot(w, x, acc, WARPS: tl.constexpr, K_WIDTH: tl.constexpr):
    """acc + W xᵀ for one run of columns.

    Args:
        w: [G·WARPS·32, run] weights, G groups of 8 rows (an even number).
        x: [H·WARPS·32, run] activations, H groups of 8 tokens, the same dtype; the columns of a
            run may stand in any order that is that of `w`.
        acc: float32 [WARPS, 8·G, 8·H].
        K_WIDTH: as `k_width` says.
    """
    G: tl.constexpr = w.shape[0] // (WARPS * 32)
    H: tl.constexpr = x.shape[0] // (WARPS * 32)
    RUN: tl.constexpr = w.shape[1]
    if w.dtype.primitive_bitwidth == 16 and K_WIDTH == 4:
        w = w.reshape(G, WARPS, 8, 4, RUN // 4, 4).permute(1, 0, 2, 4, 3, 5)
        x = x.reshape(H, WARPS, 8, 4, RUN // 4, 4).permute(1, 4, 3, 5, 0, 2)
    elif w.dtype.primitive_bitwidth == 16:
        # k is (.., second register, lane, half of a register).
        w = w.reshape(G, WARPS, 8, 4, RUN // 4, 2, 2).permute(1, 0, 2, 4, 5, 3, 6)
        x = x.reshape(H, WARPS, 8, 4, RUN // 4, 2, 2).permute(1, 4, 5, 3, 6, 0, 2)
    else:
        w = w.reshape(G, WARPS, 8, 4, RUN).permute(1, 0, 2, 4, 3)
        x = x.reshape(H, WARPS, 8, 4, RUN).permute(1, 4, 3, 0, 2)
    w = w.reshape(WARPS, 8 * G, 4 * RUN)
    x = x.reshape(WARPS, 4 * RUN, 8 * H)
    if w.dtype.primitive_bitwidth == 16:
        acc = tl.dot(w, x, acc)
    else:
        # Decoded weights are exact in tf32 (11 bits); a float32 is the sum of two tf32 numbers.
        high = (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
        acc = tl.dot(w, high, acc, input_precision="tf32")
        acc = tl.dot(w, x - high, acc, input_precision="tf32")
    return acc


def token_groups(x_NC: torch.Tensor) -> int:
    """Groups of 8 tokens of a program: what holds all tokens, at most 4; 1 for float32.

    More tokens are dealt out to programs that decode the same weights again: 64 tokens as 2 x 32
    take 9.6 instructions a weight and 168 registers, at once 8.7 and all 255. float32 needs twice
    the registers for activations and spills from 16 tokens on.
    """
    return 1 if x_NC.dtype == torch.float32 else min(4, bucket(len(x_NC)) // 8)


def max_registers(token_groups: int) -> int:
    """A limit for the compiler, which without one settles for fewer registers and spills two.

    128 leave room for two programs of 8 warps on a multiprocessor.
    """
    return {1: 128, 2: 128, 4: 168}[token_groups]


def k_width(*, joined: bool, narrow: bool) -> int:
    """Consecutive k of a lane in the operand layout that the compiler picks for 16-bit types.

    It goes by the history of the weights, which the AOT tests pin down: triton 3.6 picks 4 if they
    were `joined` from several tensors, 3.9 if they depend on a `narrow` load (bytes, or pieces of
    an entry), both 2 otherwise. A wrong value gives right results at the cost of shuffles, up to
    one for every two weights.
    """
    return 4 if (joined if triton.__version__.startswith("3.6.") else narrow) else 2
