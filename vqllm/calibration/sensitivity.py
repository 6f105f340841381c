"""How much the model's predictions suffer from errors in the weights of each linear."""

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

FEWEST_TOKENS = 1 << 14
TOKENS_PER_FEATURE = 8
"""H of as many tokens is taken for that of all: with 8 tokens a feature, rounding loses about an
eighth less by the tokens it was fitted to than by others."""

Judge = Callable[[str, Tensor, tuple[Tensor, Tensor]], list[float]]
"""Called with the full name of a linear, its weights W [R, C] as the model stores them, and H and
H_F; returns its expected losses."""


class Sensitivity:
    """Collects the curvature of the loss in the weights of each linear, and has it judged.

    The KL divergence of the predictions from the original ones grows with an error E of W by

        ½ E[(gᵀ E x)²] ≈ ½ tr(E H_F Eᵀ),     H_F = E[|g|²/R · x xᵀ]

    nats a token, with x the input and g the gradient in the output of a token; the mean is over all
    calibration tokens, also those that do not reach the linear. Tokens count as independent, and
    the outputs as uncoupled and alike, as in GuidedQuant (arXiv 2505.07004) with a single group.
    H is what rounding will be done with: tokens weigh (|g|²/R)^power in it.

    Held are H and H_F of one layer, 8 C² bytes for each of its linears (4 C² with power 1). Every
    k-th token counts, so that they take about as long as the gradients themselves.
    """

    def __init__(self, judge: Judge, num_tokens: int, power: float) -> None:
        self._judge = judge
        self._num_tokens = num_tokens
        self._power = power
        self._weights: dict[str, Tensor] = {}
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._found: dict[str, list[float]] = {}

    def begin(self, linears: Mapping[str, nn.Linear]) -> None:
        """A layer comes next."""
        self._weights = {name: linear.weight.data for name, linear in linears.items()}

    def visit(self, name: str, rows: slice, x: Tensor, g: Tensor) -> None:
        """Add a batch: the input [.., C] of a linear and the gradients in its outputs, [.., R]."""
        step = max(1, self._num_tokens // max(FEWEST_TOKENS, TOKENS_PER_FEATURE * x.shape[-1]))
        x_NC = x.flatten(0, -2)[::step].float()
        weight_N1 = step * g.flatten(0, -2)[::step].float().square().mean(1, keepdim=True)
        if name not in self._sums:
            H_F = x_NC.new_zeros(x_NC.shape[1], x_NC.shape[1])
            self._sums[name] = (H_F if self._power == 1 else torch.zeros_like(H_F), H_F)
        H_CC, H_F = self._sums[name]
        H_F.addmm_((x_NC * weight_N1).T, x_NC)
        if H_CC is not H_F:
            H_CC.addmm_((x_NC * weight_N1**self._power).T, x_NC)

    def finish(self, index: int) -> None:
        """All batches of layer `index` have been seen."""
        for name, W_RC in self._weights.items():
            if name in self._sums:
                H_CC, H_F = self._sums.pop(name)
                self._found[name] = self._judge(name, W_RC, (H_CC, H_F / self._num_tokens))
            else:
                logger.warning("%s: no token reached it, so errors in it count nothing", name)
                self._found[name] = []
        self._weights, self._sums = {}, {}

    def result(self) -> dict[str, Tensor]:
        """What the judge said, float64 by full name; empty for a linear that no token reached."""
        found = sorted(self._found.items())
        return {name: torch.tensor(losses, dtype=torch.float64) for name, losses in found}
