"""Straight-through estimation: real weights move, and the model computes with the codes nearest to
them. The usual way to train with quantized weights, here as what PV-Tuning is compared with.

Every round Adam moves the real weights of all tiles by the gradient that the decoded ones had, and
all tiles are coded again.

Source: Bengio et al., arXiv 1308.3432; as the baseline in Malinovskii et al., "PV-Tuning", arXiv
2405.14852, section 4.2.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from vqllm.core.protocols import JSON
from vqllm.tuning.base import MODEL_TUNINGS, ModelTask
from vqllm.tuning.codes import CodeDescent, CodeRun, everywhere, named, restore

DECAY = 0.95
"""Of the mean of squared gradients."""


@MODEL_TUNINGS.register("straight_through")
class StraightThrough(CodeDescent):
    """All codes follow real weights, which take the gradients of the decoded ones."""

    type: Literal["straight_through"] = "straight_through"
    weight_rate: float = Field(
        0.01, gt=0, le=1, description="step size of the real weights over their root mean square"
    )

    def __call__(self, task: ModelTask) -> JSON:
        return _StraightThroughRun(self, task).run()


class _StraightThroughRun(CodeRun):
    """The means of squared gradients belong to the state too."""

    def __init__(self, stage: StraightThrough, task: ModelTask) -> None:
        super().__init__(stage, task)
        self._weight_rate = stage.weight_rate
        self._moves = 0
        self._squares = {name: torch.zeros_like(X_NE) for name, X_NE in self._real.items()}

    @torch.no_grad()
    def _move_codes(self, gradients: dict[str, Tensor]) -> None:
        self._moves += 1
        for name, matrix in self._task.codes.items():
            gradient_NE = gradients.pop(name)
            X_NE, square_NE = self._real[name], self._squares[name]
            square_NE.lerp_(gradient_NE.square(), 1 - DECAY)
            mean_NE = (square_NE / (1 - DECAY**self._moves)).sqrt_().clamp_(min=1e-30)
            rate = self._weight_rate * self._factor * X_NE.square().mean().sqrt()
            X_NE.sub_(rate * gradient_NE / mean_NE)
            where_N = everywhere(matrix)
            matrix.put(matrix.nearest(X_NE, where_N), where_N)

    def _state(self) -> tuple[JSON, dict[str, Tensor]]:
        told, tensors = super()._state()
        return {**told, "moves": self._moves}, tensors | named("squares", self._squares)

    def _load(self, told: JSON, tensors: Mapping[str, Tensor]) -> None:
        super()._load(told, tensors)
        self._moves = told["moves"]
        restore("squares", self._squares, tensors)
