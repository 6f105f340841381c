"""How much errors in the weights of each linear change the model's predictions."""

import logging
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from vqllm.calibration.visitors import Findings, Visitor
from vqllm.core import linalg, threads

logger = logging.getLogger(__name__)

FEWEST_TOKENS = 1 << 14
TOKENS_PER_FEATURE = 8
"""H and H_F come from a sample of the tokens, of at least this size. With 8 tokens a feature, the
loss of rounding on these tokens is about an eighth less than on others."""

SEQUENCE = 128
"""Tokens of a sequence, roughly: what the products of the gradients of its tokens cost."""

SHARED_BYTES = 2 << 30
"""What H and H_F of the experts of a layer may take before they have them together."""

Judge = Callable[[str, Tensor, tuple[Tensor, Tensor]], list[float]]
"""Called with the full name of a linear, its weights W [R, C] as the model stores them, and H and
H_F; returns its expected losses."""


class Sensitivity(Visitor):
    """Collects the curvature of the loss in the weights of each linear, and passes it to the judge.

    The KL divergence of the predictions for a sequence from the original ones grows with an error E
    of W by

        ½ E[(Σ_t g_tᵀ E x_t)²] ≈ ½ tr(E H_F Eᵀ),     H_F = E[Xᵀ (g gᵀ) X] / R

    nats, with the inputs X [L, C] and the gradients g [L, R] in the outputs of its tokens. The
    outputs count as uncoupled and alike, as in GuidedQuant (arXiv 2505.07004) with a single group,
    but not the tokens: attention reads many of them at once, so that errors they have in common
    add up. Of the demo model's linears at 2 bits, tokens that count as independent (g gᵀ diagonal)
    give 1/1.6 to 1/1.8 of the measured divergence for o_proj, 1/1.0 to 1/1.1 for down_proj.
    Where the input of a linear is not whole sequences (experts), tokens do count as independent.
    H_F is divided by the tokens of a sequence: losses are in nats a token.

    H is the Hessian that rounding will use: tokens weigh (|g|²/R)^power in it.

    In memory are H and H_F of one layer, 8 C² bytes for each of its linears. Where those of its
    experts would take more than `SHARED_BYTES`, they have them together, and an expert the part
    of H_F that its tokens have of the trace of all, Σ |g|² |x|². Only every k-th
    sequence is used, so that they take about as long as the gradients themselves.
    """

    def __init__(self, judge: Judge, num_tokens: int, power: float) -> None:
        self._judge = judge
        self._num_tokens = num_tokens
        self._power = power
        self._weights: dict[str, Tensor] = {}
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._experts: Mapping[str, str] = {}
        """what linears of experts have in common"""
        self._roles: Mapping[str, str] = {}
        """the same where they share H and H_F, else nothing"""
        self._traces: dict[str, float] = {}

    def share(self, roles: Mapping[str, str]) -> None:
        """What linears of experts have in common, in the layer that comes next."""
        self._experts = self._roles = roles

    def begin(self, linears: Mapping[str, nn.Linear]) -> None:
        """A layer comes next."""
        sizes = [linears[name].in_features for name in self._experts]
        if sum(8 * cols**2 for cols in sizes) <= SHARED_BYTES:
            self._roles = {}
        self._weights = {name: linear.weight.data for name, linear in linears.items()}

    def keep(self, names: Collection[str]) -> None:
        """These linears are to be judged here."""
        self._weights = {name: W for name, W in self._weights.items() if name in names}

    def cost(self, linear: nn.Linear) -> float:
        """Of the sums, and of the judgement."""
        rows, cols = linear.out_features, linear.in_features
        num = self._num_tokens / self._step("", cols)
        return num * (cols + SEQUENCE) * (rows + cols) + 4.0 * cols**3

    def _step(self, name: str, cols: int) -> int:
        """Every so many sequences are used."""
        if name in self._experts and name not in self._roles:
            return 1  # it has few tokens
        return max(1, self._num_tokens // max(FEWEST_TOKENS, TOKENS_PER_FEATURE * cols))

    def part_of(self, name: str, rows: slice, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """Of a batch those tokens that are used: the input [S, L, C] of a linear and the gradients
        in its outputs, [S, L, R]."""
        step = self._step(name, x.shape[-1])
        # Every step-th sequence of the whole data, wherever the batches begin; of an input without
        # sequences every step-th token, each one a sequence by itself.
        if x.dim() == 3 and len(x) == rows.stop - rows.start:
            own = slice(-rows.start % step, None, step)
            return x[own], g[own]
        x, g = (a.flatten(0, -2)[::step, None] for a in (x, g))
        return x, g

    def add(self, name: str, part: tuple[Tensor, ...]) -> None:
        """Add what `part_of` gave."""
        x_own, g_own = part
        step = self._step(name, x_own.shape[-1])
        x_SLC, g_SLR = x_own.float(), g_own.float()
        if name in self._roles:
            own = x_SLC.square().sum(-1) * g_SLR.square().sum(-1)
            self._traces[name] = self._traces.get(name, 0.0) + float(threads.total(own))
            name = self._roles[name]
        if name not in self._sums:
            H_CC = x_SLC.new_zeros(x_SLC.shape[-1], x_SLC.shape[-1])
            self._sums[name] = (H_CC, torch.zeros_like(H_CC))
        H_CC, H_F = self._sums[name]
        x_NC = x_SLC.flatten(0, 1)
        # Σ Xᵀ (g gᵀ / R) X, times the step for the sequences that are left out.
        gg_SLL = g_SLR @ g_SLR.mT * (step / g_SLR.shape[-1])
        linalg.add_symmetric(H_F, (gg_SLL @ x_SLC).flatten(0, 1), x_NC)
        if self._power > 0:
            # The diagonal of g gᵀ / R is |g|² / R of each token.
            weight_SL = torch.diagonal(gg_SLL, dim1=1, dim2=2) ** self._power
            linalg.add_symmetric(H_CC, x_NC * weight_SL.reshape(-1, 1), x_NC)
        else:
            x_NC = x_own.flatten(0, 1)  # in its own dtype
            linalg.add_symmetric(H_CC, x_NC, x_NC)

    def finish(self) -> Findings:
        """The expected losses of the layer's linears, float64; empty where no token came."""
        findings: Findings = {}
        totals: dict[str, float] = {}
        for name, trace in self._traces.items():
            totals[self._roles[name]] = totals.get(self._roles[name], 0.0) + trace
        for name, W_RC in self._weights.items():
            losses: list[float] = []
            role = self._roles.get(name, name)
            if role in self._sums and (role == name or name in self._traces):
                H_CC, H_F = self._sums[role]
                share = 1.0 if role == name else self._traces[name] / max(totals[role], 1e-30)
                H_F = linalg.symmetric(H_F) / self._num_tokens
                hessians = linalg.symmetric(H_CC), H_F if share == 1.0 else H_F * share
                losses = self._judge(name, W_RC, hessians)
            else:
                logger.warning("%s: no token reached it, so errors in it count nothing", name)
            findings[name] = torch.tensor(losses, dtype=torch.float64)
        self._weights, self._sums, self._traces = {}, {}, {}
        return findings
