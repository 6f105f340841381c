"""The loss that rounding a linear is expected to cause, before anything is rounded."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vqllm.calibration.gradients import WITHOUT
from vqllm.core import linalg, threads
from vqllm.errors import NumericalError
from vqllm.plan.packed_spec import transformed
from vqllm.recipes import Recipe
from vqllm.rounding.nearest import Nearest


def expected_losses(
    name: str, W_RC: Tensor, hessians: tuple[Tensor, Tensor], recipe: Recipe, mse: Sequence[float]
) -> list[float]:
    """½ tr((W − Ŵ) H_F (W − Ŵ)ᵀ) that rounding with another H leaves, to be expected for codecs
    with these mean squared errors at unit variance.

    A rule with feedback chooses Ŵ near to A = W + E (L − I), with E = W − Ŵ, H = L D Lᵀ in tile
    columns and gaps G = A − Ŵ, so that E = G L⁻¹. If the entries of G are independent, with a
    variance of mse times that of A, then with S of the entries of I − L⁻¹ squared

        var(A_j) = σ² + mse Σ_k S_kj var(A_k)
        E[tr(E H_F Eᵀ)] = R · mse · Σ_j var(A_j) (L⁻¹ H_F L⁻ᵀ)_jj

    At low rates feedback makes the targets larger: at 1 bit the demo model's loss is 2.5 times
    that without the first line's sum. Without feedback E = G.

    Args:
        name: of the linear, for seeds and errors.
        W_RC: as the model stores it.
        hessians: H and H_F, [C, C], neither damped: rounding makes the loss by H small, and the
            result is the loss by H_F.
    """
    H_CC, H_F = hessians
    if linalg.is_zero(H_CC):
        return [0.0] * len(mse)
    # Rounding works on transformed weights, so W, H and H_F are taken to that basis.
    W_RC = W_RC.to(H_CC)
    linears, H_prime = transformed({name: W_RC}, H_CC, recipe)
    W_prime, states = linears[name].W_RC, linears[name].states
    for transform, state in zip(recipe.transforms, states):
        if transform.side == "in":
            H_F = transform.spec(len(H_F)).forward_hessian(H_F, state)
    try:
        if not bool(H_F.isfinite().all()):
            raise NumericalError(f"NaN or infinite. Avoid them with {WITHOUT}")
        H_damped = linalg.damp(H_prime, recipe.hessian.damping, recipe.hessian.shrinkage)
        inverse_CC = _inverse_of_feedback(H_damped, recipe)
    except NumericalError as error:
        raise NumericalError(f"{name}, gradients in its outputs: {error}") from error
    # (L⁻¹ H_F L⁻ᵀ)_jj: the loss per unit of variance of the gap in column j.
    cost_C = ((inverse_CC @ H_F) * inverse_CC).sum(1)
    # S has the entries of I − L⁻¹ squared: those of L⁻¹ without its diagonal of ones.
    S_CC = inverse_CC.square_()
    torch.diagonal(S_CC).zero_()
    sigma_C1 = threads.mean(W_prime.square()).expand(len(S_CC), 1)
    losses = []
    for error in mse:
        # (I − mse Sᵀ) var(A) = σ², a triangular system.
        var_C1 = torch.linalg.solve_triangular(
            S_CC.T * -error, sigma_C1, upper=True, unitriangular=True
        )
        losses.append(
            float(len(W_RC) * error * threads.total((var_C1[:, 0] * cost_C).double()) / 2)
        )
    return losses


def _inverse_of_feedback(H_CC: Tensor, recipe: Recipe) -> Tensor:
    """L⁻¹ of H = L D Lᵀ in tile columns of the recipe's codec, float32; I if there is none."""
    one_CC = torch.eye(len(H_CC), device=H_CC.device)
    if isinstance(recipe.rounding, Nearest):
        return one_CC
    width = recipe.codec.tile[1]
    # Features that are coupled to nothing fill up the last tile; their part of L is dropped again.
    missing = -len(H_CC) % width
    if missing:
        H_CC = torch.block_diag(H_CC, torch.eye(missing, device=H_CC.device))
    L_CC, _ = linalg.block_ldl(H_CC, width)
    num = len(one_CC)
    return torch.linalg.solve_triangular(L_CC[:num, :num], one_CC, upper=False)
