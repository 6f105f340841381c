"""The lengths of a pyramid code for Gaussian weights, and the best pulses and lengths for a rate.

The best length for a tile x in its direction y is x·y/‖y‖ = ‖x‖ cos. The cosine hardly varies and
does not depend on ‖x‖. ‖x‖ has the chi distribution, so the levels are those of Lloyd and Max for
the chi distribution, times the root mean square of the cosine.
"""

import math
from functools import cache

import torch
from torch import Tensor

from vqllm_kernels.pyramid import reference
from vqllm_kernels.pyramid.spec import MAX_LEVELS

_SHIFTS = tuple(0.2 + 0.02 * i for i in range(16))
"""Shifts S that are tried in rounding to floor(t |x| + S). 0.26 is best at a quarter of a pulse a
weight, 0.38 at 0.65, 0.5 in the limit of many; the error is flat around the best."""

_MANY = 8
"""Pulses a weight from which on the direction error has its limiting form, within 0.1 %."""


@cache
def choose(dim: int, bits: int) -> tuple[int, int]:
    """Pulses and levels with the least expected error whose codes have at most `bits` bits.

    Levels are as many as the bits leave room for, at most 256; of the numbers of pulses that leave
    the same room, the largest. (0, 0) if not even one pulse fits.
    """
    # From the largest number of pulses down: more levels, coarser directions. Numbers of pulses
    # that leave the same levels are worse than the largest of them.
    best, least, before = (0, 0), math.inf, 0
    for pulses in range(reference.most_pulses(dim, 1, bits), 0, -1):
        levels = min((1 << bits) // reference.num_directions(dim, pulses), MAX_LEVELS)
        if levels == before:
            continue
        before = levels
        error = expected_error(dim, pulses, levels)
        if error < least:
            best, least = (pulses, levels), error
        elif direction_error(dim, pulses) > least or levels == MAX_LEVELS:
            break  # fewer pulses only make the directions worse
    return best


def expected_error(dim: int, pulses: int, levels: int) -> float:
    """Mean squared error of Gaussian weights of unit variance."""
    direction = direction_error(dim, pulses)
    return direction + (1 - direction) * _chi_levels(dim, levels)[1] / dim


def unit_levels(dim: int, pulses: int, levels: int) -> Tensor:
    """The lengths for Gaussian weights of unit variance, float64 [levels], ascending."""
    return _chi_levels(dim, levels)[0] * math.sqrt(1 - direction_error(dim, pulses))


@cache
def direction_error(dim: int, pulses: int) -> float:
    """The mean of 1 − cos² between a Gaussian tile and the nearest direction.

    In large tiles the nearest y is floor(t |x| + S) with the t that gives the pulses, and the S
    that gives the least error; the error is then an integral over one Gaussian weight. In small
    tiles the fixed number of pulses is a constraint that costs a factor 1 + 1.1 / dim: from 1.115
    to 1.14 was measured at dim 8, 1.063 to 1.074 at 16, 1.030 to 1.036 at 32, 1.018 at 64.
    """
    want = pulses / dim
    if want > _MANY:
        # y is t x but for a rounding error of variance 1/12, and t the pulses over the mean of |x|.
        return 1 / (1 + 12 * (want * math.sqrt(math.pi / 2)) ** 2) * (1 + 1.1 / dim)
    # For every shift S: bisection for the t at which the mean of y is the wanted one.
    shift_S = torch.tensor(_SHIFTS, dtype=torch.float64)
    low_S, high_S = torch.full_like(shift_S, 1e-2), torch.full_like(shift_S, 2 * want + 4)
    for _ in range(50):
        scale_S = (low_S + high_S) / 2
        few_S = _moments(scale_S, shift_S)[0] < want
        low_S = torch.where(few_S, scale_S, low_S)
        high_S = torch.where(few_S, high_S, scale_S)
    # E[x²] = 1, so cos² = E[|x| y]² / E[y²].
    _, product_S, square_S = _moments(low_S, shift_S)
    return float((1 - product_S**2 / square_S).min()) * (1 + 1.1 / dim)


def _moments(scale_S: Tensor, shift_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means of y, |x| y and y² for y = floor(t |x| + S), over a Gaussian x, of each t and S.

    y is at least j where |x| >= (j − S) / t.
    """
    largest = int(9 * float(scale_S.max())) + 2
    j_J1 = torch.arange(1, largest + 1, dtype=torch.float64)[:, None]
    edge_JS = (j_J1 - shift_S) / scale_S
    tail_JS = torch.special.erfc(edge_JS / math.sqrt(2))
    density_JS = math.sqrt(2 / math.pi) * torch.exp(-(edge_JS**2) / 2)
    return tail_JS.sum(0), density_JS.sum(0), ((2 * j_J1 - 1) * tail_JS).sum(0)


@cache
def _chi_levels(dim: int, num: int) -> tuple[Tensor, float]:
    """Lloyd-Max levels of the norm of `dim` Gaussians, float64 [num], and their squared error."""
    # The density r^(dim − 1) exp(−r²/2) on a grid of P points around its maximum.
    center = math.sqrt(dim - 0.5)
    norm_P = torch.linspace(max(center - 6, 1e-3), center + 6, 1 << 14, dtype=torch.float64)
    log_P = (dim - 1) * norm_P.log() - norm_P**2 / 2
    mass_P = torch.exp(log_P - log_P.max())
    mass_P = mass_P / mass_P.sum()
    # Sums over all points before each point: the sum over a cell is the difference of two.
    sums_3P = torch.stack((mass_P, mass_P * norm_P, mass_P * norm_P**2)).cumsum(1)
    sums_3P = torch.nn.functional.pad(sums_3P, (1, 0))
    # Dense codes have their levels in proportion to the cube root of the density.
    rank_P = mass_P.pow(1 / 3).cumsum(0)
    middle_G = (torch.arange(num, dtype=torch.float64) + 0.5) / num * rank_P[-1]
    level_G = norm_P[torch.searchsorted(rank_P, middle_G)]
    for _ in range(500):
        mass_G, first_G, _ = _cells(norm_P, sums_3P, level_G)
        before_G, level_G = level_G, first_G / mass_G
        if float((level_G - before_G).abs().max()) < 1e-7:
            break
    mass_G, first_G, second_G = _cells(norm_P, sums_3P, level_G)
    return level_G, float((second_G - level_G * (2 * first_G - level_G * mass_G)).sum())


def _cells(norm_P: Tensor, sums_3P: Tensor, level_G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the points that are nearest to each level, [G]."""
    edge_G = torch.searchsorted(norm_P, (level_G[1:] + level_G[:-1]) / 2)
    ends = edge_G.new_tensor([0]), edge_G.new_tensor([len(norm_P)])
    mass_G, first_G, second_G = sums_3P[:, torch.cat((ends[0], edge_G, ends[1]))].diff(dim=1)
    return mass_G, first_G, second_G
