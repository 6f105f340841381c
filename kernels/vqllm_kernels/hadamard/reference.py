"""The transform of `matrices`, in plain torch on any device: the definition that kernels follow."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from vqllm_kernels.hadamard import matrices

DENSE_ORDER = 128
"""Up to this order one dense product is used. [65536, 1536] in bfloat16 takes 0.41 s on one core
in blocks of 128 and 0.60 s as 8 ⊗ 16, but 0.64 s in blocks of 256 and 0.25 s as 16 ⊗ 16."""

SYLVESTER_PIECE = 64
"""Largest dense piece of a Sylvester factor. [65536, 1536] in bfloat16 takes 0.33 s on one core as
24 ⊗ 64 and 0.43 s as 12 ⊗ 128."""

CHUNK_ELEMENTS = {"cpu": 2**18, "other": 2**25}
"""Features that are transformed at a time. On a CPU 1 MB of float32 stays in the cache:
[65536, 576] in bfloat16 takes 0.11 s on one core, as long as the conversions alone, and 0.35 s in
one piece. Elsewhere it bounds the float32 copies of a half-precision input to 128 MB each."""


def transform(v: Tensor, block: int, transpose: bool = False) -> Tensor:
    """Q v along the last axis, in blocks of `block` features; Qᵀ v with `transpose`.

    float32 and float64 are computed in their own precision; narrower types are computed in float32
    throughout and rounded once, at the end.

    Args:
        v: float tensor [..., features].
        block: order of Q = `matrices.matrix(block)`; divides the number of features.

    Returns:
        A new tensor of the shape and dtype of `v`.
    """
    if block < 1 or v.shape[-1] % block:
        raise ValueError(f"a block of {block} does not divide {v.shape[-1]} features")
    if not v.dtype.is_floating_point:
        raise ValueError(f"the transform needs a floating-point tensor, not {v.dtype}")
    compute = v.dtype if v.dtype in (torch.float32, torch.float64) else torch.float32
    stages = _stages(block, compute, v.device)
    v_NB = v.reshape(-1, block)
    if v.requires_grad and torch.is_grad_enabled():
        return _apply(v_NB.to(compute), stages, transpose).to(v.dtype).reshape(v.shape)
    y_NB = torch.empty_like(v_NB, memory_format=torch.contiguous_format)
    budget = CHUNK_ELEMENTS["cpu" if v.device.type == "cpu" else "other"]
    chunk = max(1, budget // block)
    for start in range(0, len(v_NB), chunk):
        part = v_NB[start : start + chunk].to(compute)
        y_NB[start : start + chunk] = _apply(part, stages, transpose)
    return y_NB.reshape(v.shape)


def _apply(v_NB: Tensor, stages: tuple[Tensor, ...], transpose: bool) -> Tensor:
    """(Q₁ ⊗ Q₂ ⊗ …) applied to the rows of v, last factor first."""
    num_rows, block = v_NB.shape
    inner = 1
    for Q in reversed(stages):
        size = len(Q)
        Q = Q.T if transpose else Q
        if inner == 1:
            v_NB = v_NB.reshape(-1, size) @ Q.T
        else:
            v_NB = v_NB.reshape(-1, size, inner)
            v_NB = torch.bmm(Q.expand(len(v_NB), -1, -1), v_NB)
        inner *= size
    return v_NB.reshape(num_rows, block)


@lru_cache(maxsize=256)
def _stages(order: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Dense matrices whose Kronecker product is the transform of this order."""
    # A matrix made in inference mode could not be used under autograd later.
    with torch.inference_mode(False):
        return tuple(matrices.kronecker(sizes).to(device, dtype) for sizes in _plan(order))


def _plan(order: int) -> list[tuple[int, ...]]:
    """The factors of `order`, Sylvester's split and small ones joined, one tuple a product."""
    sizes = matrices.factors(order)
    if order <= DENSE_ORDER:
        return [sizes]
    twos = sizes[-1].bit_length() - 1 if sizes[-1] & (sizes[-1] - 1) == 0 else 0
    cores: list[tuple[int, ...]] = [(size,) for size in sizes[: len(sizes) - (twos > 0)]]
    piece = SYLVESTER_PIECE.bit_length() - 1
    over = twos % piece
    if cores and twos > piece and cores[-1][0] << over <= SYLVESTER_PIECE:
        cores[-1] = (*cores[-1], 1 << over)
        twos -= over
    num_pieces = math.ceil(twos / piece)
    even, more = divmod(twos, max(num_pieces, 1))
    pieces = [(1 << even + (i >= num_pieces - more),) for i in range(num_pieces)]
    return [*cores, *pieces]
