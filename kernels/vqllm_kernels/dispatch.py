"""The operations of a packed linear, as the run-time layer calls them.

    linear     y = x Wᵀ + bias: all transforms, the product and the bias, one operator
    linears    the same for linears of one input, whose transforms of it are applied once, and
               whose products are one where formats are equal and kernels run
    dense      W in the model's own basis
    matmul     y = x Wᵀ in the transformed basis, W packed
    decode     W in the transformed basis
    transform  x' from x, or y from y' (a transform on one side of the product)

    implementation  what it does                                       taken for
    triton          decodes in registers, feeds the tensor cores       CUDA, up to 64 rows of x
    dense           decodes W (with a kernel if there is one), then    CUDA, more rows, or a format
                    torch's product in the dtype of x                  without a kernel
    packed          multiplies codes as they are stored, by products   CPU, activations of 16 bits
                    of integers (numba)
    lookup          looks up products with the entries of a small      CPU, up to 8 rows of x
                    codebook (numba)
    reference       the definition in torch, products in float32       every other case

The limit of 64 rows is computed, not measured: on an H100 the small-batch kernels are bound by
decoding (2 to 4 instructions a weight) up to about 50 rows and by the tensor cores from there on.

This module only gathers names. Which file answers what:

    ops         what torch sees: operators, their shapes and derivatives
    forward     how y comes from x: the order of the steps, and what linears of one input share
    select      which implementation serves a call, and why the others do not
    kernels     what a format's kernels have to offer
    reference   what runs where there are none
    launch      the host side of the Triton kernels
"""

from vqllm_kernels.kernels import Call
from vqllm_kernels.ops import decode, decode_rows, dense, linear, linears, matmul, transform
from vqllm_kernels.select import (
    Choice,
    beats_kept_weights,
    choices,
    choose,
    force,
    forget,
    is_forced,
    multiplied_packed,
)

__all__ = [
    "Call",
    "Choice",
    "beats_kept_weights",
    "choices",
    "choose",
    "decode",
    "decode_rows",
    "dense",
    "force",
    "forget",
    "is_forced",
    "linear",
    "linears",
    "matmul",
    "multiplied_packed",
    "transform",
]
