"""The KL divergence that errors in each linear are expected to cause, from few sequences.

It is what a budget of bits is shared out by (`vqllm/allocation/sensitivity.py`), measured on a few
thousand tokens. That is too few for H: rounding seems to hide its errors better than it can. What
half of the tokens give shows how far off all of them are. Of the demo model's linears at 2 bits,
1024 tokens give 0.358 nats, 2048 0.464, and 16384 0.621; the line through the first two over one
by the root of the number of tokens leads to 0.629 there.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vqllm.allocation.distortion import gaussian_mse
from vqllm.allocation.expected_loss import expected_losses
from vqllm.allocation.sensitivity import FEWEST_TOKENS, TOKENS_PER_FEATURE, Sensitivity
from vqllm.calibration.visitors import Findings, Visitor
from vqllm.core.protocols import Codec
from vqllm.plan.cuts import divided
from vqllm.plan.selection import Selection
from vqllm.recipes import Recipe

logger = logging.getLogger(__name__)

ERRORS = tuple(0.5 * 2.0**-k for k in range(13))
"""Relative errors of a codec for which losses are computed; others lie between."""
COMPARED = 6
"""Layers whose losses are computed from half of the tokens too."""

_KNOWN: dict[str, float] = {}

Hessians = dict[str, tuple[Tensor, tuple[Tensor, Tensor]]]


def error_of(codec: Codec) -> float:
    """The mean squared error of a codec on Gaussian weights, computed once."""
    key = repr(codec)
    if key not in _KNOWN:
        _KNOWN[key] = gaussian_mse(codec)
    return _KNOWN[key]


@dataclass
class Losses:
    """Expected losses of linears, nats a token, at each of `ERRORS`, float64 by full name."""

    by_error: dict[str, Tensor] = field(default_factory=dict)

    def of(self, name: str, error: float) -> float:
        """The loss of a linear whose codec has this relative error."""
        known = self.by_error.get(name)
        if known is None or not len(known) or float(known[0]) <= 0 or error <= 0:
            return 0.0
        # A line between two logarithms; beyond the last ones the loss grows as the error.
        place = min(max(math.log2(ERRORS[0] / error), 0.0), len(ERRORS) - 1.0)
        low = min(int(place), len(ERRORS) - 2)
        first, second = (math.log(float(known[i])) for i in (low, low + 1))
        own = math.exp(first + (second - first) * (place - low))
        return own * error / (ERRORS[0] * 2.0**-place)

    def table(self, selection: Selection, codecs: Sequence[Codec]) -> dict[str, Tensor]:
        """The losses of each linear with each of these codecs, as an allocation takes them."""
        errors = [error_of(codec) for codec in codecs]
        return {
            name: torch.tensor([self.of(name, e) for e in errors], dtype=torch.float64)
            for name in selection.shapes
        }


class FewSequences(Visitor):
    """Collects the losses of linears from few sequences: two halves of them apart, which give H
    and H_F of all, and of one half for `COMPARED` layers."""

    def __init__(
        self, selection: Selection, recipe: Recipe, num_tokens: int, num_layers: int
    ) -> None:
        self._selection, self._recipe, self._num_tokens = selection, recipe, num_tokens
        self._step = max(1, num_layers // COMPARED)
        self._layer = 0
        self._num_judged = 0
        power = recipe.hessian.power if recipe.hessian.weights == "output" else 0.0
        self._kept: tuple[Hessians, Hessians] = ({}, {})
        self._halves = [
            Sensitivity(self._keeper(kept), max(1, num_tokens // 2), power) for kept in self._kept
        ]
        self._found: dict[str, Tensor] = {}
        self._ratios: dict[str, list[float]] = {}

    def share(self, roles: Mapping[str, str]) -> None:
        """What linears of experts have in common, in the layer that comes next."""
        for half in self._halves:
            half.share(roles)

    def begin(self, linears: Mapping[str, nn.Linear]) -> None:
        """A layer comes next."""
        for half in self._halves:
            half.begin(linears)

    def visit(self, name: str, rows: slice, x: Tensor, g: Tensor) -> None:
        """Add a batch: its sequences go to the halves in turns."""
        numbers = range(rows.start, rows.stop)
        if x.dim() == 3 and len(x) == len(numbers):
            for parity, half in enumerate(self._halves):
                own = [i for i, number in enumerate(numbers) if number % 2 == parity]
                if own:
                    half.visit(name, slice(0, len(own)), x[own], g[own])
            return
        x, g = x.flatten(0, -2), g.flatten(0, -2)
        for parity, half in enumerate(self._halves):
            if len(x) > parity:
                half.visit(name, slice(0, 0), x[parity::2], g[parity::2])

    def finish(self) -> Findings:
        """Nothing of its own: `losses` has those of all layers."""
        quiet = logging.getLogger("vqllm.allocation.sensitivity")
        level = quiet.level
        quiet.setLevel(logging.ERROR)  # experts that so few tokens do not reach are no news
        for half in self._halves:
            half.finish()
        quiet.setLevel(level)
        first, second = self._kept
        compared = self._layer % self._step == 0
        for name, (W_RC, (H_CC, H_F)) in first.items():
            half = self._judge(name, W_RC, (H_CC, H_F)) if compared or name not in second else None
            if name not in second:
                assert half is not None, "just computed"
                self._found[name] = half / 2  # the other half has none of its tokens
                continue
            H_other, F_other = second[name][1]
            own = self._judge(name, W_RC, (H_CC + H_other, (H_F + F_other) / 2))
            self._found[name] = own
            if half is not None and float(own[2]) > 0:
                ratio = float(half[2] / own[2])
                self._ratios.setdefault(_kind(name), []).append(ratio)
        for name in second.keys() - first.keys():
            self._found[name] = self._judge(name, *second[name]) / 2
        first.clear()
        second.clear()
        self._layer += 1
        return {}

    @property
    def share_of_one(self) -> float:
        """Of the judging, what a run does: once for each linear."""
        return len(self._found) / max(1, self._num_judged)

    def losses(self) -> Losses:
        """The losses of all linears, as more tokens would give them."""
        found = {}
        for name, own in self._found.items():
            cols = self._selection.shapes[name][1]
            enough = max(FEWEST_TOKENS, TOKENS_PER_FEATURE * cols)
            ratios = self._ratios.get(_kind(name), [1.0])
            ratio = min(1.0, sum(ratios) / len(ratios))
            here, there, half = (
                1 / math.sqrt(n) for n in (self._num_tokens, enough, self._num_tokens / 2)
            )
            growth = 1 + (1 - ratio) * max(0.0, here - there) / (half - here)
            found[name] = own * growth
        return Losses(found)

    def _keeper(self, kept: Hessians):
        def keep(name: str, W_RC: Tensor, hessians: tuple[Tensor, Tensor]) -> list[float]:
            kept[name] = W_RC, hessians
            return []

        return keep

    def _judge(self, name: str, W_RC: Tensor, hessians: tuple[Tensor, Tensor]) -> Tensor:
        self._num_judged += 1
        own = divided(self._recipe, self._selection.cuts.get(name))
        losses = expected_losses(name, W_RC, hessians, own, ERRORS)
        return torch.tensor(losses, dtype=torch.float64)


def _kind(name: str) -> str:
    return name.rpartition(".")[2]
