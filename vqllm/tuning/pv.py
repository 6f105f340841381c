"""PV-Tuning: steps on what is continuous (P), and in turn steps on a few of the codes (V).

The V step follows the linearised objective in a subspace. Real weights, which begin as the decoded
ones, go down the gradient of every round. Of every matrix it takes the tiles whose real weights are
farthest from what their codes reproduce, `share` of them, and looks for the codes nearest to these
with the encoder of the codec itself: for a trellis that is the best path of the whole tile, for a
sum of codebooks a beam. Codes that lie uphill are left out. The exchange has to lower the loss of
the batch that follows, on which no gradient was taken; otherwise the half with the smaller descent
for its length is taken back, and half of that, and all of it in the end. What went through makes
the share of the next round larger, what did not makes it smaller.

Steps in proportion to the gradient, with one length for each matrix: on one matrix with known codes
(64 x 32, 60 rounds; KL divergence at the end) they lead much further than those of Adam, which are
alike for all weights, and real weights that go on from round to round lead further than those that
begin anew in each, whose steps have to reach another code at once:

                            kmeans   e8p     pyramid  uniform  trellis
    at first                0.142    0.228   0.208    0.193    0.208
    this                    0.002    0.008   0.014    0.019    0.070
    with Adam               0.005    0.032   0.174    0.157    0.161
    anew in every round     0.0006   0.120   0.073    0.048    0.130
    straight through        0.070    0.093   0.082    0.105    0.084

(of each the best of three lengths and two shares, but this one: 0.03 and 0.5).

Source: Malinovskii et al., "PV-Tuning", arXiv 2405.14852, algorithm 1 and section 3.2 (the V step
linearised and in a subspace). There the steps are those of Adam, and nothing is taken back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from vqllm.core.protocols import JSON
from vqllm.tuning.base import MODEL_TUNINGS, CodedMatrix, ModelTask
from vqllm.tuning.codes import CodeLoop, CodeTuning

LEAST_SHARE = 1e-6


@MODEL_TUNINGS.register("pv")
class PV(CodeTuning):
    """A small share of the codes moves after every round, where that lowers the loss."""

    type: Literal["pv"] = "pv"
    share: float = Field(
        0.1, gt=0, le=1, description="of the tiles that may move in a round, at most"
    )
    weight_rate: float = Field(
        0.03,
        gt=0,
        le=1,
        description="how far the real weights of a matrix go in a round, root mean square over "
        "that of the weights",
    )
    tries: int = Field(
        3, ge=1, description="how many sizes of a step are tried, each half of the one before"
    )

    def __call__(self, task: ModelTask) -> JSON:
        return PVLoop(self, task).train()


@dataclass
class _Exchange:
    """New codes of some tiles of a matrix, those of the steepest descent first."""

    matrix: CodedMatrix
    where_K: Tensor
    new_KM: Tensor
    old_KM: Tensor

    def apply(self, part: float) -> int:
        """Let this part of the tiles have their new codes, and the others their old ones.

        Returns:
            how many have new ones.
        """
        num = round(part * len(self.where_K))
        self.matrix.set_codes(self.new_KM[:num], self.where_K[:num])
        self.matrix.set_codes(self.old_KM[num:], self.where_K[num:])
        return num


def _apply(exchanges: list[_Exchange], part: float) -> int:
    return sum(exchange.apply(part) for exchange in exchanges)


class PVLoop(CodeLoop):
    """The share of the next round and the counts of the report belong to the state too."""

    def __init__(self, stage: PV, task: ModelTask) -> None:
        super().__init__(stage, task)
        self._pv = stage
        self._share = stage.share
        self._rounds: list[JSON] = []

    def _move_codes(self, gradients: dict[str, Tensor]) -> None:
        exchanges = [self._exchange(name, gradients.pop(name)) for name in self._task.codes]
        # The batch that the next step takes: no gradient was taken on it yet.
        tokens_SL = self._task.sequences[self._batch(self._step)]
        # The whole step, half of it, ...: the first that lowers the loss.
        with torch.no_grad():
            before = self._mean_loss(tokens_SL)
            for part in (2.0**-i for i in range(self._pv.tries)):
                moved = _apply(exchanges, part)
                after = self._mean_loss(tokens_SL) if moved else before
                if after < before:
                    factor = 1.5 if part == 1 else part
                    break
            else:
                moved, after, factor = _apply(exchanges, 0), before, 0.5
        # A step that went through makes the next one longer.
        self._share = min(self._pv.share, max(LEAST_SHARE, self._share * factor))
        self._rounds.append({"step": self._step, "moved": moved, "kl": [before, after]})

    @torch.no_grad()
    def _exchange(self, name: str, gradient_NE: Tensor) -> _Exchange:
        """Move the real weights of a matrix; the codes that the farthest tiles would get."""
        matrix, real_NE = self._task.codes[name], self._real[name]
        # The real weights go down the gradient, as far in every matrix relative to its size.
        X_NE = matrix.tiles().flatten(0, 1)
        length = self._pv.weight_rate * self._factor * _size(X_NE)
        real_NE -= length / _size(gradient_NE).clamp(min=1e-30) * gradient_NE
        # Those farthest from what their codes reproduce are coded again.
        distance_N = (real_NE - X_NE).square().sum(1)
        num = max(1, round(self._share * len(distance_N)))
        where_K = distance_N.topk(num).indices.sort().values
        g_KE, old_KM = gradient_NE[where_K], matrix.codes_at(where_K)
        new_KM = matrix.nearest(real_NE[where_K], where_K).to(old_KM)
        # What that changes, for a moment.
        matrix.set_codes(new_KM, where_K)
        change_KE = matrix.tiles().flatten(0, 1)[where_K] - X_NE[where_K]
        matrix.set_codes(old_KM, where_K)
        # Of these the ones that lie downhill, the steepest first.
        length_K = change_KE.norm(dim=1)
        slope_K = -(g_KE * change_KE).sum(1) / length_K.clamp(min=1e-30)
        order_K = slope_K.sort(descending=True, stable=True).indices
        order_K = order_K[slope_K[order_K] > 0]
        return _Exchange(matrix, where_K[order_K], new_KM[order_K], old_KM[order_K])

    def _report(self) -> JSON:
        report = super()._report()
        # The best state has the codes of its own rounds.
        moved = [own["moved"] for own in self._rounds if own["step"] <= report["best_step"]]
        return {**report, "rounds": self._rounds, "codes_moved": sum(moved)}

    def _record(self) -> JSON:
        return {**super()._record(), "share": self._share, "rounds": list(self._rounds)}

    def _load(self, record: JSON, tensors: Mapping[str, Tensor]) -> None:
        super()._load(record, tensors)
        self._share, self._rounds = record["share"], list(record["rounds"])


def _size(X_NE: Tensor) -> Tensor:
    """The root mean square."""
    return X_NE.square().mean().sqrt()
