"""The Triton kernels of the Hadamard transform, and how they are launched; `triton` has their code.

A transform of up to 128 features is one product (`_dense`), a larger one goes in `passes`, most
often a single one, which can write bytes for the product (`quantize`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vqllm_kernels import activations
from vqllm_kernels.bitpack import unpack_bits
from vqllm_kernels.hadamard import matrices
from vqllm_kernels.hadamard import triton as module
from vqllm_kernels.kernels import Call, Quantized, Tensors, Wanted
from vqllm_kernels.transforms import HadamardSpec

if TYPE_CHECKING:
    from vqllm_kernels.kernels import Scales

compiled: Any = module
"""The compiled kernels, whose launches a type checker does not know."""

MAX_DENSE = 128
MAX_SYLVESTER = 64
MAX_LEFT = 512
MAX_QUANTIZED_LEFT = 128
"""Rows of B up to which one program transforms and quantizes all features of a token: 128 x 64 are
8192 features and 2 MFLOP, on an H100 half a microsecond of one multiprocessor, less than a launch.
448 x 64 would be 10. With float32's three products it spills on sm_80."""

_factors = WeakTensorKeyDictionary()
"""Stored signs -> (addresses and versions of what went in, factors)."""


@dataclass(frozen=True)
class HadamardKernels:
    """The `TransformKernels` in Triton, for float16, bfloat16 and float32."""

    def declines(self, call: Call) -> str | None:
        """None: they take every order."""
        return None

    def transforms(
        self,
        vs: Sequence[Tensor],
        specs: Sequence[HadamardSpec],
        tensors: Sequence[Tensors],
        direction: str,
        scales: "Sequence[Scales]",
    ) -> list[Tensor]:
        every_v = tuple(v.contiguous() for v in vs)
        if sum(v.numel() for v in every_v) == 0:
            return [torch.empty_like(v) for v in every_v]
        every_factor = tuple(
            factors(spec, own["signs"], of_member)
            for spec, own, of_member in zip(specs, tensors, scales, strict=True)
        )
        sizes = tuple(spec.size for spec in specs)
        order = specs[0].order
        run = _dense if order <= MAX_DENSE else _by_passes
        return run(every_v, every_factor, sizes, order, direction == "output")

    def quantizes(self, spec: HadamardSpec, dtype: torch.dtype) -> bool:
        return dtype != torch.float32 and _one_block(spec) is not None

    def quantize(
        self,
        v: Tensor,
        spec: HadamardSpec,
        tensors: Tensors,
        scales: "Scales",
        wanted: Wanted,
    ) -> Quantized:
        one_block = _one_block(spec)
        if one_block is None:
            raise ValueError(f"{spec}: too large for one program, as `quantizes` says")
        sizes, repeats, post, has_sylvester = one_block
        v = v.contiguous()
        out = activations.empty(len(v), wanted, v.dtype, v.device)
        if len(v) == 0:
            return out
        B, scale = _matrix(sizes, v.device, repeats)
        m = len(B)
        compiled.quantized_pass_kernel[(len(v),)](
            v,
            factors(spec, tensors["signs"], scales),
            B,
            out.words.view(torch.int8),
            out.step,
            m,
            post,
            scale / math.sqrt(post) if has_sylvester else scale,
            wanted.padded_cols,
            *wanted.factors,
            *wanted.offsets,
            BIT=wanted.bit,
            PARTS=out.parts,
            LEVELS=activations.LEVELS[out.parts],
            HAS_SYLVESTER=has_sylvester,
            ROWS=max(16, triton.next_power_of_2(m)),
            BLOCK_SUM=min(64, max(16, triton.next_power_of_2(m))),
            COLS=max(16, triton.next_power_of_2(post)),
            TAIL=triton.next_power_of_2(max(1, wanted.padded_cols - spec.size)),
            num_warps=8,
            enable_fp_fusion=True,
        )
        return out


@cache
def _matrix(sizes: tuple[int, ...], device: torch.device, repeats: int = 1) -> tuple[Tensor, float]:
    """(matrix, scale): their product is the Kronecker product of the factors of these sizes, or
    several of them along the diagonal.

    ±1 and 0 in int8 if all are Hadamard matrices, else float32.
    """
    with torch.inference_mode(False):
        if repeats > 1:
            Q, scale = _matrix(sizes, torch.device("cpu"))
            return torch.kron(torch.eye(repeats, dtype=Q.dtype), Q).to(device), scale
        if all(size % 2 == 0 or size == 1 for size in sizes):
            Q = torch.ones(1, 1, dtype=torch.int8)
            for size in sizes:
                Q = torch.kron(Q, matrices.signs(size))
            return Q.to(device), 1 / math.sqrt(math.prod(sizes))
        return matrices.kronecker(sizes).float().to(device), 1.0


@cache
def passes(order: int) -> tuple[tuple[tuple[int, ...], int, bool], ...]:
    """(sizes of the factors in B, columns of X, whether the columns are Sylvester's) a pass.

    The factors of `matrices`, last to first. What Sylvester's factor has beyond 64 is cut into
    pieces of at most 64 that go into B.
    """
    sizes = list(matrices.factors(order))
    twos = sizes.pop() if sizes[-1] & (sizes[-1] - 1) == 0 else 1
    post = min(twos, MAX_SYLVESTER)
    rest = twos // post
    while rest > 1:
        piece = min(rest, MAX_SYLVESTER)
        sizes.append(piece)
        rest //= piece
    plan = []
    has_sylvester = True
    while sizes or has_sylvester:
        left: list[int] = []
        while sizes and (not left or math.prod(left) * sizes[-1] <= MAX_LEFT):
            left.insert(0, sizes.pop())
        plan.append((tuple(left) or (1,), post, has_sylvester and post > 1))
        has_sylvester = False
        post *= math.prod(left)
    return tuple(plan)


@cache
def _one_block(spec: HadamardSpec) -> tuple[tuple[int, ...], int, int, bool] | None:
    """(sizes of the factors in B, how often B is repeated along the diagonal, columns of X, whether
    the columns are Sylvester's) of all features of a token as one X; None if X is too large."""
    order = spec.order
    (sizes, post, has_sylvester), *others = passes(order)
    repeats = spec.size // order
    if others or repeats * math.prod(sizes) > MAX_QUANTIZED_LEFT:
        return None
    return sizes, repeats, post, has_sylvester


def factors(spec: HadamardSpec, signs: Tensor, scales: "Scales" = ()) -> Tensor:
    """Signs times scales, float32 [size]; kept for as long as the signs live."""
    parts = [signs, *(tensor for _, tensors in scales for tensor in tensors.values())]
    key = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in parts]
    kept = _factors.get(signs)
    if kept is None or kept[0] != key:
        with torch.inference_mode(False), torch.no_grad():
            product = 1 - 2 * unpack_bits(signs, 1, spec.size).float()
            for scale, tensors in scales:
                product = product * scale.scale(tensors).float()
            kept = (key, product.contiguous())
        _factors[signs] = kept
    return kept[1]


def _dense(
    vs: tuple[Tensor, ...],
    every_factor: tuple[Tensor, ...],
    sizes: tuple[int, ...],
    order: int,
    transpose: bool,
) -> list[Tensor]:
    """One product with the whole matrix, 16 blocks of features a program."""
    ys = tuple(torch.empty_like(v) for v in vs)
    every_blocks = tuple(v.numel() // order for v in vs)
    Q, scale = _matrix(matrices.factors(order), vs[0].device)
    compiled.dense_kernel[(sum(triton.cdiv(num_blocks, 16) for num_blocks in every_blocks),)](
        vs,
        every_factor,
        Q,
        ys,
        every_blocks,
        sizes,
        order,
        scale,
        FACTOR="after" if transpose else "before",
        TRANSPOSE=transpose,
        IS_EXACT=vs[0].dtype == torch.float32,
        BLOCKS=16,
        PAD=max(16, triton.next_power_of_2(order)),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return list(ys)


def _by_passes(
    vs: tuple[Tensor, ...],
    every_factor: tuple[Tensor, ...],
    sizes: tuple[int, ...],
    order: int,
    transpose: bool,
) -> list[Tensor]:
    """Pass after pass; what lies between two of them is float32."""
    dtype, plan = vs[0].dtype, passes(order)
    # With three products for one, 64 rows or 4 warps spill on sm_90.
    block_sum, num_warps = (32, 8) if dtype == torch.float32 else (64, 4)
    for index, (left, post, has_sylvester) in enumerate(plan):
        is_last = index == len(plan) - 1
        ys = tuple(torch.empty_like(v, dtype=dtype if is_last else torch.float32) for v in vs)
        m = math.prod(left)
        B, scale = _matrix(left, vs[0].device)
        # Factors of features: before the first pass of an input, after the last of an output.
        comes = "none"
        if is_last and transpose:
            comes = "after"
        elif index == 0 and not transpose:
            comes = "before"
        # A program makes 32 rows of Y of one block.
        block_rows = min(32, max(16, triton.next_power_of_2(m)))
        block_cols = min(MAX_SYLVESTER, max(16, triton.next_power_of_2(post)))
        every_blocks = tuple(v.numel() // (m * post) for v in vs)
        grid = (sum(every_blocks), triton.cdiv(m, block_rows), triton.cdiv(post, block_cols))
        compiled.pass_kernel[grid](
            vs,
            every_factor,
            B,
            ys,
            every_blocks,
            sizes,
            m,
            post,
            scale / math.sqrt(post) if has_sylvester else scale,
            HAS_SYLVESTER=has_sylvester,
            FACTOR=comes,
            TRANSPOSE=transpose,
            IS_EXACT=dtype == torch.float32,
            BLOCK_ROWS=block_rows,
            BLOCK_SUM=min(block_sum, max(16, triton.next_power_of_2(m))),
            BLOCK_COLS=block_cols,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
        vs = ys
    return list(vs)
