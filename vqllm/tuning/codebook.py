"""Least squares of what a codec learned, with the codes as they are; codes and codebooks in turn.

With J the derivative of Ŵ by the floating tensors of the state, the step is the s of least

    tr((E − J s) H (E − J s)ᵀ)        E = W − Ŵ

by conjugate gradients on its normal equations. J and Jᵀ are products with the decoder's derivative,
so that any codec with a differentiable decoder can be tuned. Where decoding is linear in the state
(codebooks, also added ones, and scales of fixed codes) the step leads to the minimum. Where it is
not, it is shortened until the loss falls. The loss is compared after rounding to what can be
stored, and the old state stays if it was better.

With `rounds`, the rounding rule then chooses codes again for the new codebooks, and so on in turn,
until a round gains little.

Proxy loss and seconds of one core's time for 10^6 weights: 384 rows of two linears of the demo
model with row scales, additive codec (2 x 256 entries for 8 weights):

                                       q_proj          down_proj
    ldlq                               0.00685   1.0   0.1054   1.1
    ldlq, codebook                     0.00668   3.6   0.0896   2.3
    ldlq, codebook, 3 rounds           0.00622   7.4   0.0720   8.5
    beam, 4 passes                     0.00627   7.7   0.0878   7.5
    beam, 4 passes, codebook           0.00617         0.0793   9.2
    beam, 2 passes, codebook, rounds   0.00610  15.0   0.0665  25.1

Source: AQLM, arXiv 2401.06118, section 3.3 and algorithm 1 (there with 100 steps of Adam in place
of the solution); conjugate gradients: Hestenes and Stiefel, J. Res. NBS 49 (1952), 409-436.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from vqllm.tiles import from_tiles
from vqllm.tuning.base import TUNINGS
from vqllm.types import Codec, Rounding, State, Tuning

_HALVINGS = 4
"""How often a step is halved where decoding is not linear in the state."""
_ROUNDING = 1e-13
"""Squared length of the residual relative to the first one, below which all is rounding."""


@TUNINGS.register("codebook")
class Codebook(Tuning):
    """Codebooks and scales of least loss for the chosen codes."""

    type: Literal["codebook"] = "codebook"
    steps: int = Field(20, ge=1, description="conjugate-gradient steps on codebooks and scales")
    rounds: int = Field(
        0,
        ge=0,
        description="how often the rounding rule chooses codes again and the codebooks are tuned "
        "to them, at most",
    )
    tolerance: float = Field(
        0.01, ge=0, lt=1, description="the rounds end when one lowers the loss by a smaller share"
    )

    def __call__(
        self,
        W_RC: Tensor,
        H_CC: Tensor,
        codec: Codec,
        codes_IJM: Tensor,
        state: State,
        rounding: Rounding,
    ) -> tuple[Tensor, State]:
        problem = _Problem(W_RC, H_CC, codec, codes_IJM)
        state, loss = problem.improved(state, self.steps)
        for _ in range(self.rounds):
            new_codes_IJM, new_state = rounding.refine(W_RC, H_CC, codec, codes_IJM, state)
            problem = _Problem(W_RC, H_CC, codec, new_codes_IJM)
            new_state, new_loss = problem.improved(new_state, self.steps)
            gained = new_loss < loss
            enough = new_loss < (1 - self.tolerance) * loss
            if gained:
                codes_IJM, state, loss = new_codes_IJM, new_state, new_loss
            if not enough:
                break
        return codes_IJM, state


@dataclass(frozen=True)
class _Problem:
    """tr((W − Ŵ) H (W − Ŵ)ᵀ) as a function of the codec's state."""

    W_RC: Tensor
    H_CC: Tensor
    codec: Codec
    codes_IJM: Tensor

    def W_hat(self, state: State) -> Tensor:
        X_IJE = self.codec.decode(self.codes_IJM, state)
        return from_tiles(X_IJE, self.codec.tile, *self.W_RC.shape)

    def loss(self, state: State) -> float:
        E_RC = self.W_RC - self.W_hat(state)
        return _inner(E_RC @ self.H_CC, E_RC)

    def improved(self, state: State, steps: int) -> tuple[State, float]:
        """A state of lower loss that can be stored, or the same, and its loss."""
        learned = {name: t.float() for name, t in state.items() if t.is_floating_point()}
        before = self.loss(state)
        if not learned:
            return state, before
        move = self.least_squares(state, learned, steps)
        for halvings in range(1 + _HALVINGS):
            moved = {name: t + move[name] / 2**halvings for name, t in learned.items()}
            stored = self.codec.project({**state, **moved})
            after = self.loss(stored)
            if after < before:
                return stored, after
        return state, before

    def least_squares(self, state: State, learned: State, steps: int) -> State:
        """The change of `learned` of least loss, as far as decoding is linear, after `steps`."""
        J = _Derivative(self, state, learned)
        EH_RC = (self.W_RC - J.W_hat_RC) @ self.H_CC
        residual = J.transposed(EH_RC)
        move = {name: torch.zeros_like(t) for name, t in learned.items()}
        direction = residual
        size = first = _dot(residual, residual)
        for _ in range(steps):
            if size <= _ROUNDING * first:
                break
            change_RC = J(direction)
            change_H_RC = change_RC @ self.H_CC
            curvature = _inner(change_H_RC, change_RC)
            if not curvature > 0:
                break
            # Along the direction this is the minimum, also where rounding has turned it.
            length = _dot(residual, direction) / curvature
            move = {name: t + length * direction[name] for name, t in move.items()}
            EH_RC = EH_RC - length * change_H_RC
            residual = J.transposed(EH_RC)
            previous, size = size, _dot(residual, residual)
            turn = size / previous
            direction = {name: t + turn * direction[name] for name, t in residual.items()}
        return move


class _Derivative:
    """J, the derivative of Ŵ by the learned tensors, as products with it and its transpose."""

    def __init__(self, problem: _Problem, state: State, learned: State) -> None:
        with torch.enable_grad():
            self._inputs = [t.clone().requires_grad_() for t in learned.values()]
            self._names = list(learned)
            output_RC = problem.W_hat({**state, **self._named(self._inputs)})
            self._output_RC = output_RC
            # Jᵀ u is linear in u, with the derivative J: decoders need no derivative but this one.
            self._u_RC = torch.zeros_like(output_RC, requires_grad=True)
            self._pulled = torch.autograd.grad(
                output_RC, self._inputs, self._u_RC, create_graph=True, materialize_grads=True
            )
        self.W_hat_RC = output_RC.detach()

    def __call__(self, direction: State) -> Tensor:
        """J times the direction, [R, C]."""
        values = [direction[name] for name in self._names]
        return torch.autograd.grad(self._pulled, self._u_RC, values, retain_graph=True)[0]

    def transposed(self, u_RC: Tensor) -> State:
        """Jᵀ u."""
        grads = torch.autograd.grad(
            self._output_RC, self._inputs, u_RC, retain_graph=True, materialize_grads=True
        )
        return self._named(grads)

    def _named(self, values: Sequence[Tensor]) -> State:
        return dict(zip(self._names, values))


def _inner(A_RC: Tensor, B_RC: Tensor) -> float:
    """Σ A B, added up in float64."""
    return float((A_RC.double() * B_RC).sum())


def _dot(a: State, b: State) -> float:
    return sum(_inner(t, b[name]) for name, t in a.items())
