"""Learning the G and mu of companded lattices: the best of some starts, then Adam.

All groups are learned at the same time. Sums are in float64 and codes come from elementwise
arithmetic, so that the result does not depend on the number of threads.

Source: GLVQ, arXiv 2510.20984: new codes in every step, G and mu by gradient, G held near a start
from the covariance.

Shapes as in `learned_lattice_nearest`. Weights x are those of the model over the scale of their
group, of about unit size.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from vqllm.codecs.search.learned_lattice import Lattice
from vqllm_kernels.learned_lattice import reference

_MU_BOUNDS = (2.0**-6, 255.0)
"""At the lower end F is straight to 1 %. GLVQ's bounds, 10 and 255 for weights of at most 1, are
about 2 and 50 here. That is too curved for Gaussian weights, whose best mu is 0.2 to 1: at 2 bits
and mu = 2 their error is 0.146, against 0.119 without companding."""
_KNEES = (0.35, 0.8, 1.4, 2.1)
"""1 / mu of the start. On E8 with tanh 1.9 is best for Gaussian weights, 1.6 for Laplacian ones;
with mu 1 to 1.8, and 0.8."""
_EDGES = (0.65, 0.85, 1.05, 1.4, 2.2)
"""Half the width of the box of the start, over 1.3 + 0.55 bits: best for Gaussian weights on E8."""
_START_WEIGHTS = 1 << 12
"""Weights of a group that a start is chosen on."""
_RATE = 0.02
"""Of Adam for G, in steps of the lattice; at 0.03 and above Laplacian weights are not learned."""
_DIAGONAL_BOUNDS = (0.25, 4.0)
"""Of the diagonal of G over that of the start: G stays well-conditioned."""


def start(x_EPN: Tensor, weight_EPN: Tensor, shape: Lattice) -> Lattice:
    """The best of some boxes and mu, sheared by the covariance of the components.

    Args:
        weight_EPN: of squared errors; 0 for vectors that do not count.
        shape: the kind of lattice; its G and mu are not read.
    """
    # A few mu times a few sizes of the box, each on a part of the vectors.
    num = max(1, _START_WEIGHTS // len(x_EPN))
    x, weight = x_EPN[..., :num], weight_EPN[..., :num]
    best, least_P = shape, torch.full_like(shape.mu_P, torch.inf, dtype=torch.float64)
    for knee in _KNEES if shape.companding != "none" else _KNEES[:1]:
        mu_P = torch.full_like(shape.mu_P, 1 / knee)
        L_PEE = _shear(x_EPN, weight_EPN, replace(shape, mu_P=mu_P))
        for edge in _EDGES:
            tried = replace(shape, G_PEE=L_PEE * _steps(shape, mu_P, edge)[:, None], mu_P=mu_P)
            error_P = error(tried, x, weight, tried.nearest(x, weight))
            best = _choose(error_P < least_P, tried, best)
            least_P = torch.minimum(error_P, least_P)
    return best


@torch.enable_grad()
def train(
    x_EPN: Tensor, weight_EPN: Tensor, first: Lattice, iterations: int, regularization: float
) -> Lattice:
    """The lattices of the least weighted squared error on the way from `first`.

    Args:
        regularization: weight of the penalty for leaving `first.G_PEE`, as a number of vectors.
    """
    # Learned are `move`, in steps of the lattice, and log mu. G = first + step · move has the free
    # elements of its form: lower triangular or diagonal.
    first_PEE, unit_P = first.G_PEE.double(), _unit(first.mu_P.double(), first.companding)
    diagonal_PE = torch.diagonal(first_PEE, dim1=1, dim2=2)
    low_PE, high_PE = (diagonal_PE * bound for bound in _DIAGONAL_BOUNDS)
    step_P11 = diagonal_PE.mean(1)[:, None, None]
    free_EE = torch.ones_like(first_PEE[0]).tril()
    if first.diagonal:
        free_EE = torch.eye(len(free_EE)).to(free_EE)
    move_PEE = torch.zeros_like(first_PEE, requires_grad=True)
    log_mu_P = first.mu_P.double().log().requires_grad_()
    rates = [{"params": [move_PEE], "lr": _RATE}, {"params": [log_mu_P], "lr": 3 * _RATE}]
    adam = torch.optim.Adam(rates, eps=1e-12)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / max(iterations, 1))
    )
    best, least_P, scale_P = first, torch.full_like(unit_P, torch.inf), None
    for _ in range(iterations + 1):
        # G with its diagonal within bounds, times F(1) of the new mu over that of the first.
        mu_P = log_mu_P.clamp(*map(math.log, _MU_BOUNDS)).exp()
        G_PEE = first_PEE + step_P11 * free_EE * move_PEE
        diagonal_PE = torch.diagonal(G_PEE, dim1=1, dim2=2)
        bounded_PE = torch.minimum(torch.maximum(diagonal_PE, low_PE), high_PE)
        G_PEE = G_PEE + torch.diag_embed(bounded_PE - diagonal_PE)
        G_PEE = G_PEE * (_unit(mu_P, first.companding) / unit_P)[:, None, None]
        now = replace(first, G_PEE=G_PEE.detach().float(), mu_P=mu_P.detach().float())
        # New codes for this G and mu; the error is differentiated with the codes as they are.
        codes_EPN = now.nearest(x_EPN, weight_EPN)
        error_P = error(replace(first, G_PEE=G_PEE, mu_P=mu_P), x_EPN, weight_EPN, codes_EPN)
        best = _choose(error_P.detach() < least_P, now, best)
        least_P = torch.minimum(error_P.detach(), least_P)
        # Errors count relative to the first ones, so that all groups learn at the same rate.
        if scale_P is None:
            scale_P = least_P.clamp_min(torch.finfo(torch.float64).tiny)
        penalty = regularization / x_EPN.shape[2] * move_PEE.square().sum()
        adam.zero_grad()
        ((error_P / scale_P).sum() + penalty).backward()
        adam.step()
        schedule.step()
    return best


def error(lattice: Lattice, x_EPN: Tensor, weight_EPN: Tensor, codes_EPN: Tensor) -> Tensor:
    """The weighted squared error of each group, float64 [P]; differentiable in G and mu."""
    codes_PNE = codes_EPN.permute(1, 2, 0)
    q_PNE = reference.coordinates(codes_PNE, lattice.base, lattice.widths).double()
    y_PNE = torch.bmm(q_PNE, lattice.G_PEE.double().mT)
    x_PNE = reference.expand(y_PNE, lattice.mu_P.double()[:, None, None], lattice.companding)
    square_PNE = (x_PNE - x_EPN.permute(1, 2, 0)) ** 2
    return (weight_EPN.permute(1, 2, 0) * square_PNE).flatten(1).sum(1)


def _steps(shape: Lattice, mu_P: Tensor, edge: float) -> Tensor:
    """The diagonal of G of a box, [P, E]."""
    widths_E = torch.tensor(shape.widths).to(mu_P)
    end_PE = reference.compress(edge * (1.3 + 0.55 * widths_E), mu_P[:, None], shape.companding)
    return (end_PE * 2 / torch.exp2(widths_E)).expand(len(mu_P), -1)


def _shear(x_EPN: Tensor, weight_EPN: Tensor, lattice: Lattice) -> Tensor:
    """The Cholesky factor of the covariance of F(x) over its mean diagonal, [P, E, E].

    Correlations of less than twice their standard error count as zero; if G is diagonal, all do.
    """
    y_PEN = reference.compress(
        x_EPN.transpose(0, 1), lattice.mu_P[:, None, None], lattice.companding
    ).double()
    weight_P1N = weight_EPN.mean(0).double()[:, None]
    C_PEE = torch.bmm(weight_P1N * y_PEN, y_PEN.mT)
    size_PE = torch.diagonal(C_PEE, dim1=1, dim2=2).sqrt().clamp_min(1e-30)
    r_PEE = C_PEE / (size_PE[:, :, None] * size_PE[:, None])
    certain_PEE = (r_PEE.square() * (weight_P1N > 0).sum(2, keepdim=True) > 4).double()
    eye_EE = torch.eye(len(x_EPN)).to(r_PEE)
    if lattice.diagonal:
        certain_PEE = torch.zeros_like(certain_PEE)
    # 0.99 of the correlations, because a group of equal weights has a singular covariance.
    L_PEE, info_P = torch.linalg.cholesky_ex(torch.lerp(0.99 * certain_PEE * r_PEE, eye_EE, eye_EE))
    L_PEE = torch.where(info_P[:, None, None] > 0, eye_EE, L_PEE)
    size_PE = size_PE / size_PE.square().mean(1, keepdim=True).sqrt()
    return (size_PE.clamp(*_DIAGONAL_BOUNDS)[:, :, None] * L_PEE).float()


def _unit(mu_P: Tensor, companding: str) -> Tensor:
    """F(1): G is learned relative to it, so that a change of mu alone does not change the box."""
    return reference.compress(torch.ones_like(mu_P), mu_P, companding)


def _choose(better_P: Tensor, new: Lattice, old: Lattice) -> Lattice:
    """The new lattice of a group where it is better."""
    return replace(
        old,
        G_PEE=torch.where(better_P[:, None, None], new.G_PEE, old.G_PEE),
        mu_P=torch.where(better_P, new.mu_P, old.mu_P),
    )
