"""The exact search for the pulse vector whose direction is nearest to that of a tile.

For a tile x, made positive, the search is for y with Σ y_i = K that maximises (x·y)² / (y·y). Of
the pairs (y·y, x·y) of all y, those of one cosine lie on a curve that is concave: the best pair is
therefore a corner of their convex hull, and maximises 2t x·y − y·y for some t, that is, y minimises
|t x − y|². Such a y is found directly (`_nearest_at`), and can only be the best one if

    t = y·y / x·y                                                                    (1)

for it. The right side of (1) is a function of t, because t decides y. Once it is at most 2t, it
grows with t. So iterating (1) from below all solutions ends at the least one, and from above at the
greatest. Where the two differ, for a third of Gaussian tiles, the corners of the hull between them
are compared too.

Sums are made so that their rounding does not depend on which tiles are searched together.
"""

import math

import torch
from torch import Tensor

CHUNK = 1 << 17
"""Weights that are searched at a time: intermediate results then stay in the cache."""

_BISECTIONS = 26
"""To the last bit of a float32 of size 1."""
_MARGIN = 1e-3
"""Margin of all bounds, for the rounding of the numbers that they are computed from."""


def nearest(x_NE: Tensor, pulses: int) -> Tensor:
    """The pulse vectors whose directions are nearest to the directions of tiles.

    Args:
        x_NE: finite tiles, float32.

    Returns:
        y, float32 [E, N] of integers, Σ|y_i| = pulses. Of a tile of zeros, any.
    """
    chunks = x_NE.split(max(CHUNK // x_NE.shape[1], 1))
    return torch.cat([_nearest_signed(chunk_NE.T, pulses) for chunk_NE in chunks], 1)


def length(x_EN: Tensor, y_EN: Tensor) -> Tensor:
    """x · y / ‖y‖: the length of the direction of y that is nearest to x, [N]."""
    largest_N = x_EN.abs().amax(0).clamp(min=torch.finfo(torch.float32).tiny)
    product_N, square_N = _products(x_EN / largest_N, y_EN)
    return largest_N * (product_N / square_N.sqrt())


def _sum(x_EN: Tensor) -> Tensor:
    """Sums over the first axis, added in an order that does not depend on N."""
    while len(x_EN) > 1:
        half = len(x_EN) // 2
        halved_EN = x_EN[:half] + x_EN[half : 2 * half]
        if len(x_EN) % 2:
            halved_EN[0] += x_EN[-1]
        x_EN = halved_EN
    return x_EN[0]


def _products(x_EN: Tensor, y_EN: Tensor) -> tuple[Tensor, Tensor]:
    """x · y and y · y, [N]."""
    return _sum(x_EN * y_EN), _sum(y_EN * y_EN)


def _cosine(x_EN: Tensor, y_EN: Tensor) -> Tensor:
    """x · y / ‖y‖ for x of norm 1, [N]."""
    product_N, square_N = _products(x_EN, y_EN)
    return product_N / square_N.sqrt()


def _nearest_signed(x_EN: Tensor, pulses: int) -> Tensor:
    largest_N = x_EN.abs().amax(0)
    zero_N = largest_N < torch.finfo(torch.float32).tiny
    size_EN = torch.where(zero_N, 1.0, x_EN.abs() / torch.where(zero_N, 1.0, largest_N))
    size_EN = size_EN / _sum(size_EN * size_EN).sqrt()
    y_EN = _nearest_positive(size_EN, pulses)
    return torch.where(x_EN < 0, -y_EN, y_EN)


def _nearest_positive(x_EN: Tensor, pulses: int) -> Tensor:
    """`nearest` for positive tiles of norm 1."""
    low_EN = _fixed_point(x_EN, _below_all(x_EN, pulses), pulses)
    cosine_N = _cosine(x_EN, low_EN)
    high_EN = _fixed_point(x_EN, _above_all(x_EN, pulses, cosine_N), pulses)
    best_EN = torch.where(_cosine(x_EN, high_EN) > cosine_N, high_EN, low_EN)
    _visit_between(x_EN, low_EN, high_EN, best_EN, pulses)
    return best_EN


def _below_all(x_EN: Tensor, pulses: int) -> Tensor:
    """A lower bound of all solutions of (1): t = ‖y‖ / cosine is at least the least ‖y‖."""
    each, more = divmod(pulses, len(x_EN))
    least_square = len(x_EN) * each**2 + more * (2 * each + 1)
    return torch.full_like(x_EN[0], (1 - _MARGIN) * math.sqrt(least_square))


def _above_all(x_EN: Tensor, pulses: int, cosine_N: Tensor) -> Tensor:
    """An upper bound of all solutions of (1) whose cosine is at least `cosine_N`.

    The angle between y and the vector of ones is at most that between x and the ones plus that
    between x and y. This bounds ‖y‖ = K / (√E cos), and t = ‖y‖ / cosine. Another bound is the t at
    which all pulses are where x is largest.
    """
    root = math.sqrt(len(x_EN))
    to_ones_N = (_sum(x_EN) / root).clamp(max=1)
    cosine_N = cosine_N.clamp(max=1)
    sines_N = ((1 - to_ones_N**2) * (1 - cosine_N**2)).sqrt()
    bound_N = 1 / (root * cosine_N * (to_ones_N * cosine_N - sines_N)).clamp(min=_MARGIN)
    return (1 + _MARGIN) * pulses * torch.minimum(bound_N, 1 / x_EN.amax(0))


def _fixed_point(x_EN: Tensor, t_N: Tensor, pulses: int) -> Tensor:
    """y after (1) was iterated from t until nothing changes.

    A tile for which (1) leads to more than 2t does not change any more: the next step might pass a
    solution.
    """
    # Only tiles whose y still changes are computed again.
    y_EN = _nearest_at(x_EN, t_N, pulses)
    moving_EN = y_EN
    tiles_N = torch.arange(x_EN.shape[1], device=x_EN.device)
    while len(tiles_N):
        product_N, square_N = _products(x_EN, moving_EN)
        next_N = square_N / product_N
        next_EN = _nearest_at(x_EN, next_N, pulses)
        moves = ((next_EN != moving_EN).any(0) & (next_N <= 2 * t_N)).nonzero()[:, 0]
        tiles_N, t_N = tiles_N[moves], next_N[moves]
        x_EN, moving_EN = x_EN[:, moves], next_EN[:, moves]
        y_EN[:, tiles_N] = moving_EN
    return y_EN


def _visit_between(
    x_EN: Tensor, low_EN: Tensor, high_EN: Tensor, best_EN: Tensor, pulses: int
) -> None:
    """Compare the corners of the hull between two of them; puts the better ones into `best_EN`.

    The corner that is best for the t of the line through two corners lies beyond that line, or
    there is none. If there is one, it makes two lines.
    """
    tiles_N = (low_EN != high_EN).any(0).nonzero()[:, 0]
    low_EN, high_EN = low_EN[:, tiles_N], high_EN[:, tiles_N]
    while len(tiles_N):
        # The line through (y·y, x·y) of both: t is half the inverse of its slope.
        here_EN = x_EN[:, tiles_N]
        low_product_N, low_square_N = _products(here_EN, low_EN)
        high_product_N, high_square_N = _products(here_EN, high_EN)
        rise_N = (high_product_N - low_product_N).clamp(min=1e-9)
        middle_EN = _nearest_at(here_EN, (high_square_N - low_square_N) / (2 * rise_N), pulses)
        # A corner strictly between the two is new; the search goes on at both sides of it.
        square_N = _sum(middle_EN * middle_EN)
        new = ((square_N > low_square_N) & (square_N < high_square_N)).nonzero()[:, 0]
        tiles_N, middle_EN = tiles_N[new], middle_EN[:, new]
        _keep_better(x_EN, middle_EN, tiles_N, best_EN)
        low_EN = torch.cat((low_EN[:, new], middle_EN), 1)
        high_EN = torch.cat((middle_EN, high_EN[:, new]), 1)
        tiles_N = tiles_N.repeat(2)


def _keep_better(x_EN: Tensor, y_EN: Tensor, tiles_N: Tensor, best_EN: Tensor) -> None:
    """Put those y of tiles into `best_EN` that are better; there may be several for a tile."""
    cosine_N = _cosine(x_EN[:, tiles_N], y_EN)
    # Sorted by tile, and by cosine within a tile: the first one of each tile is its best.
    order_N = cosine_N.argsort(descending=True, stable=True)
    order_N = order_N[tiles_N[order_N].argsort(stable=True)]
    tiles_N = tiles_N[order_N]
    first = tiles_N.diff(prepend=tiles_N.new_full((1,), -1)) != 0
    better = first & (cosine_N[order_N] > _cosine(x_EN[:, tiles_N], best_EN[:, tiles_N]))
    best_EN[:, tiles_N[better]] = y_EN[:, order_N[better]]


def _nearest_at(x_EN: Tensor, t_N: Tensor, pulses: int) -> Tensor:
    """y >= 0 with Σ y = K that minimises |t x − y|².

    It is floor(t x + shift), negative values made 0, for the shift that gives K pulses. Where
    several coordinates step up at the same shift, only the first of them do.
    """
    # Bisection for the shift: `low` gives at most K pulses, `low + width` more than K.
    z_EN = x_EN * t_N
    low_N, width_N = _shifts(z_EN, pulses)
    is_exact_N = torch.zeros_like(low_N, dtype=torch.bool)
    y_EN = torch.empty_like(z_EN)
    for _ in range(_BISECTIONS):
        width_N = width_N / 2
        torch.add(z_EN, low_N + width_N, out=y_EN)
        total_N = y_EN.floor_().clamp_(min=0).sum(0)  # of integers: exact in any order
        low_N = low_N + width_N * (total_N <= pulses)
        is_exact_N |= total_N == pulses
        if bool(is_exact_N.all()):
            break
    torch.add(z_EN, low_N, out=y_EN).floor_().clamp_(min=0)
    tied = (~is_exact_N).nonzero()[:, 0]
    if len(tied):
        z_EN, low_N, below_EN = z_EN[:, tied], low_N[tied], y_EN[:, tied]
        y_EN[:, tied] = _step_up(z_EN, low_N, width_N[tied], below_EN, pulses)
    return y_EN


def _step_up(z_EN: Tensor, low_N: Tensor, width_N: Tensor, below_EN: Tensor, pulses: int) -> Tensor:
    """`below_EN` = floor(z + low), with one pulse more on the first coordinates that get one as the
    shift grows."""
    # The width at which more than K pulses are there; then as many of the steps as are missing.
    while True:
        above_EN = (z_EN + (low_N + width_N)).floor_().clamp_(min=0)
        short_N = above_EN.sum(0) <= pulses
        if not bool(short_N.any()):
            break
        width_N = torch.where(short_N, 2 * width_N, width_N)
    step_EN = above_EN - below_EN
    return below_EN + step_EN * (step_EN.cumsum(0) <= pulses - below_EN.sum(0))


def _shifts(z_EN: Tensor, pulses: int) -> tuple[Tensor, Tensor]:
    """A shift that gives at most K pulses, and how far above it one gives more than K.

    From Σ z + E·shift − E < Σ floor(z + shift) <= Σ z + E·shift, and, for negative shifts, from
    the convexity of Σ max(0, z + shift).
    """
    sum_N = _sum(z_EN)
    missing_N = pulses - sum_N
    shift_N = missing_N / len(z_EN)
    low_N = torch.where(missing_N < 0, z_EN.amax(0) * missing_N / sum_N, shift_N) - _MARGIN
    return low_N, (shift_N + 1).clamp(min=0) + _MARGIN - low_N
