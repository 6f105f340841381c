"""Codebooks and scales of a packed linear by least squares, with the codes as they are.

Of Ŵ = diag(r) B diag(c), B decoded from codes and codebooks, in the basis of the model, each of the
three is moved to where tr((W − Ŵ) H (W − Ŵ)ᵀ) is least while the others stay:

    codebooks   conjugate gradients through decoder and transforms (`vqllm.core.least_squares`)
    columns     (H ∘ VᵀV) c = diag(Vᵀ W H),  V = diag(r) B
    rows        r_i = (V H Wᵀ)_ii / (V H Vᵀ)_ii,  V = B diag(c)

Source of the scale in closed form: Zhang et al., "COMQ", arXiv 2403.07134.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from vqllm.core.least_squares import StateProblem
from vqllm.core.protocols import State
from vqllm.distillation.coded_weights import CodedWeights

STAY = 1e-4
"""Weight of staying where they are, relative to the mean of the diagonal, that column scales have:
the equations are singular where an input is always 0."""


class Scaled(Protocol):
    """A linear whose weights are (1 + rows) Ŵ (1 + columns)."""

    coded: CodedWeights | None
    rows: nn.Parameter
    columns: nn.Parameter

    def decoded(self) -> Tensor:
        """Ŵ, float32 [R, C]."""
        ...


@torch.no_grad()
def fit(
    linear: Scaled, W_RC: Tensor, H_CC: Tensor, kinds: Collection[str], steps: int
) -> tuple[float, float]:
    """Move codebooks, columns and rows, as far as they are among `kinds`, in this order.

    Args:
        W_RC: the original weights, float32.
        H_CC: damped E[x xᵀ], float32, positive definite.
        steps: of conjugate gradients.

    Returns:
        the loss before and after, relative to tr(W H Wᵀ). A move that does not lower it is not
        made.
    """
    size = _loss(W_RC, H_CC)
    if size == 0:
        return 0.0, 0.0
    before = loss = _loss(W_RC - _weights(linear), H_CC)
    # Codebooks first, then scales for what these leave.
    if "codebooks" in kinds and linear.coded is not None and linear.coded.learned:
        coded = linear.coded
        problem = _InBasis(
            W_RC, H_CC, coded.codec, coded.codes_IJM, coded, linear.rows, linear.columns
        )
        state, loss = problem.improved(coded.state(), steps)
        coded.set_state(state)
    # Each kind of scales in closed form, the others as they are.
    for kind, own, solve in (
        ("columns", linear.columns, _columns),
        ("rows", linear.rows, _rows),
    ):
        if kind in kinds:
            old = own.detach().clone()
            own.copy_(solve(linear, W_RC, H_CC) - 1)
            after = _loss(W_RC - _weights(linear), H_CC)
            if after < loss:
                loss = after
            else:
                own.copy_(old)
    return before / size, loss / size


@dataclass(frozen=True)
class _InBasis(StateProblem):
    """The problem of a codec's state in the basis of the model, between scales that stay."""

    coded: CodedWeights
    rows_R: Tensor
    columns_C: Tensor

    def W_hat(self, state: State) -> Tensor:
        B_RC = self.coded.weights_of(state)
        return (1 + self.rows_R)[:, None] * B_RC * (1 + self.columns_C)

    def _num_problems(self, learned: State) -> int:
        return 1  # transforms mix the rows


def _weights(linear: Scaled) -> Tensor:
    return (1 + linear.rows)[:, None] * linear.decoded() * (1 + linear.columns)


def _loss(E_RC: Tensor, H_CC: Tensor) -> float:
    return float(((E_RC @ H_CC).double() * E_RC).sum())


def _rows(linear: Scaled, W_RC: Tensor, H_CC: Tensor) -> Tensor:
    """The best scale of each row, [R]; the old one of a row that is 0, or would be turned round."""
    V_RC = linear.decoded() * (1 + linear.columns)
    VH_RC = V_RC @ H_CC
    inner_R, size_R = (VH_RC * W_RC).sum(1), (VH_RC * V_RC).sum(1)
    ok_R = (size_R > 0) & (inner_R > 0)
    return torch.where(ok_R, inner_R / torch.where(ok_R, size_R, 1), 1 + linear.rows)


def _columns(linear: Scaled, W_RC: Tensor, H_CC: Tensor) -> Tensor:
    """The best scale of each column, [C]."""
    V_RC = (1 + linear.rows)[:, None] * linear.decoded()
    A_CC = (H_CC * (V_RC.T @ V_RC)).double()
    stay = STAY * A_CC.diagonal().mean()
    b_C = ((W_RC @ H_CC) * V_RC).sum(0).double() + stay * (1 + linear.columns)
    A_CC.diagonal().add_(stay)
    return torch.linalg.solve(A_CC, b_C).to(W_RC)
