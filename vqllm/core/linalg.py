"""Factorisations of H for the rounding rules. Deterministic, and none of them alters its input."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from vqllm.core import threads
from vqllm.errors import NumericalError

STRIPE = 1024
"""Columns of a factor that are solved at a time: bounds the copies to C x 1024."""


def is_zero(H_CC: Tensor) -> bool:
    """Whether the input of this H = E[x xᵀ] was zero on every token."""
    return bool((torch.diagonal(H_CC) == 0).all())


def damp(H_CC: Tensor, damping: float, shrinkage: float = 1.0) -> Tensor:
    """H with its entries off the diagonal times `shrinkage`, + damping · mean(diag H) · I: positive
    definite for a positive semidefinite H.

    A feature that was zero on every calibration token (H_jj <= 0) gets mean(diag H) in place of
    its diagonal: it is then rounded to nearest by itself, and its weights still serve inputs that
    did not occur in calibration.

    Args:
        H_CC: symmetric E[x xᵀ], [C, C].
        damping: relative to mean(diag H), 0 or more.
        shrinkage: 0 to 1. The result is a mean of H, which counts this much, and of its diagonal
            alone; 1 leaves the entries as they are.

    Raises:
        NumericalError: an entry that is not finite, or an input group that is zero throughout.
    """
    if not bool(torch.isfinite(H_CC).all()):
        bad = int((~torch.isfinite(H_CC)).sum())
        raise NumericalError(
            f"the Hessian has {bad} NaN or infinite entries of {H_CC.numel()}. An activation "
            "overflowed during calibration: run it in bfloat16 or float32."
        )
    diagonal = torch.diagonal(H_CC)
    mean = diagonal.clamp_min(0).mean()
    if not bool(mean > 0):
        raise NumericalError(
            "the Hessian is zero: this input was zero on every calibration token. Use other "
            "calibration text, or leave the linear out with a `skip` pattern."
        )
    damped = H_CC.clone() if shrinkage == 1 else shrinkage * H_CC
    torch.diagonal(damped).copy_(torch.where(diagonal > 0, diagonal + damping * mean, mean))
    return damped


@threads.one_thread()
def cholesky(H_CC: Tensor) -> Tensor:
    """Lower M with H = M Mᵀ, in the dtype of H; only the lower triangle of H is read.

    Where float32 runs out of precision the factorisation is done in float64 on the CPU.

    Raises:
        NumericalError: H is not positive definite in float64 either.
    """
    M_CC, info = torch.linalg.cholesky_ex(H_CC)
    if int(info) == 0:
        return M_CC
    M_CC, info = torch.linalg.cholesky_ex(H_CC.cpu().double())
    if int(info) == 0:
        return M_CC.to(H_CC)
    diagonal = torch.diagonal(H_CC)
    raise NumericalError(
        f"the Hessian [{len(H_CC)}, {len(H_CC)}] is not positive definite (leading minor "
        f"{int(info)}; its diagonal spans {float(diagonal.min()):.3g} to "
        f"{float(diagonal.max()):.3g}). Raise the damping, for example "
        "`--set hessian.damping=0.1`, or calibrate on more tokens than there are features."
    )


def block_ldl(H_CC: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """H = L D Lᵀ with blocks of `block` features.

    Args:
        H_CC: symmetric positive definite; `block` divides C.

    Returns:
        L [C, C], lower triangular with identity blocks on the diagonal, and the blocks of the
        block-diagonal D, [C / block, block, block].

    Source: QuIP#, arXiv 2402.04396, section 4.1 (block LDL): each block column of the Cholesky
    factor times the inverse of its own diagonal block.
    """
    num_features = len(H_CC)
    if num_features % block:
        raise ValueError(f"blocks of {block} do not divide {num_features} features")
    # H = M Mᵀ; with the diagonal blocks M_kk, D_k = M_kk M_kkᵀ and L_:k = M_:k M_kk⁻¹.
    L_CC = cholesky(H_CC)
    M_KGG = diagonal_blocks(L_CC, block)
    D_KGG = M_KGG @ M_KGG.mT
    stripe = max(STRIPE // block, 1) * block
    for start in range(0, num_features, stripe):
        cols = slice(start, min(start + stripe, num_features))
        # Rows above the stripe are zero. X M_kk = (block column k), for all k of the stripe.
        columns_KRG = L_CC[start:, cols].unflatten(1, (-1, block)).transpose(0, 1)
        own = M_KGG[cols.start // block : cols.stop // block]
        solved = torch.linalg.solve_triangular(own, columns_KRG, upper=False, left=False)
        L_CC[start:, cols] = solved.transpose(0, 1).flatten(1)
    # Exactly the identity, where the solve leaves it up to rounding.
    _diagonal_view(L_CC, block).copy_(torch.eye(block, dtype=L_CC.dtype, device=L_CC.device))
    return L_CC, D_KGG


def diagonal_blocks(A_CC: Tensor, block: int) -> Tensor:
    """Copies of the square blocks on the diagonal, [C / block, block, block]."""
    return _diagonal_view(A_CC, block).clone(memory_format=torch.contiguous_format)


def _diagonal_view(A_CC: Tensor, block: int) -> Tensor:
    tiles = A_CC.unflatten(0, (-1, block)).unflatten(2, (-1, block))
    return torch.diagonal(tiles, dim1=0, dim2=2).permute(2, 0, 1)


BLOCK = 512
"""Columns of a block of a symmetric product: 2/3 of the work at 1536 features; smaller blocks save
little more and lose speed of the product."""


def symmetric_blocks(num_features: int) -> list[slice]:
    """The rows that `add_symmetric` adds to in each of its products."""
    size = -(-num_features // -(-num_features // BLOCK))
    return [slice(start, start + size) for start in range(0, num_features, size)]


def add_symmetric(
    total_CC: Tensor, a_NC: Tensor, b_NC: Tensor, blocks: Collection[int] | None = None
) -> None:
    """Add aᵀ b, known to be symmetric, to `total_CC` in place: only the blocks on and above the
    diagonal. `symmetric` completes the sum.

    Args:
        total_CC: float32.
        a_NC, b_NC: of any floating dtype. Two in bfloat16 are multiplied as such where the
            processor can; each product then is exact in float32, and so are the sums.
        blocks: numbers of `symmetric_blocks` that are added to; None for all.
    """
    in_bfloat16 = a_NC.dtype == b_NC.dtype == torch.bfloat16
    is_one = a_NC is b_NC  # as usual: one copy is enough
    a_NC = a_NC.to(total_CC)
    b_NC = a_NC if is_one else b_NC.to(total_CC)
    with _multiplied_in_bfloat16() if in_bfloat16 else nullcontext():
        for number, rows in enumerate(symmetric_blocks(len(total_CC))):
            if blocks is None or number in blocks:
                total_CC[rows, rows.start :].addmm_(a_NC[:, rows].T, b_NC[:, rows.start :])


@contextmanager
def _multiplied_in_bfloat16() -> Iterator[None]:
    """Within, float32 matrices are rounded to bfloat16 before a CPU multiplies them, if it has
    instructions for that; sums stay float32. Matrices that were bfloat16 before lose nothing.

    With AMX a product takes less than half the time, and its error is a quarter: a sum of float32
    products is rounded with each of them.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def symmetric(total_CC: Tensor) -> Tensor:
    """The symmetric matrix with what is on and above the diagonal of `total_CC`, [.., C, C]."""
    return total_CC.triu().add_(total_CC.triu(1).mT)
