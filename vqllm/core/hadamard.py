"""Which Hadamard-like transform serves a side of any size."""

from vqllm_kernels.hadamard.matrices import factors, is_hadamard, matrix
from vqllm_kernels.hadamard.reference import transform

__all__ = ["MIN_BLOCK", "block_for", "factors", "is_hadamard", "matrix", "transform"]

MIN_BLOCK = 16
"""Below this a block mixes too few weights to be worth a transform: the largest entry of a spike
shrinks by √block only."""


def block_for(size: int, at_most: int | None) -> int | None:
    """The block of a block-diagonal transform, or None for the full one.

    The one place of the rule: the largest Hadamard order that divides `size` and is at most
    `at_most`. If there is none of `MIN_BLOCK` or more, or if `at_most` is None or reaches `size`,
    the full transform, which exists for every size (a Kronecker product of Hadamard matrices and,
    where there are none, a DCT of the odd part that is left).
    """
    if at_most is None or at_most >= size:
        return None
    orders = (b for b in range(at_most, MIN_BLOCK - 1, -1) if size % b == 0 and is_hadamard(b))
    return next(orders, None)
