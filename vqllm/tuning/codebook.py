"""Codebooks and scales of least loss for the chosen codes, and codes and codebooks in turn.

The least squares are those of `vqllm.core.least_squares`, for any codec with a differentiable
decoder. With `rounds`, the rounding rule then chooses codes again for the new codebooks, and so on
in turn, until a round gains little.

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
of the solution).
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from vqllm.core.least_squares import StateProblem
from vqllm.core.protocols import Codec, Rounding, State, Tuning
from vqllm.tuning.base import TUNINGS


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
        problem = StateProblem(W_RC, H_CC, codec, codes_IJM)
        state, loss = problem.improved(state, self.steps)
        for _ in range(self.rounds):
            new_codes_IJM, new_state = rounding.refine(W_RC, H_CC, codec, codes_IJM, state)
            problem = StateProblem(W_RC, H_CC, codec, new_codes_IJM)
            new_state, new_loss = problem.improved(new_state, self.steps)
            gained = new_loss < loss
            enough = new_loss < (1 - self.tolerance) * loss
            if gained:
                codes_IJM, state, loss = new_codes_IJM, new_state, new_loss
            if not enough:
                break
        return codes_IJM, state
