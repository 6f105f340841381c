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
from vqllm.tuning.adam_loop import named, under
from vqllm.tuning.base import MODEL_TUNINGS, ModelTask
from vqllm.tuning.codes import CodeLoop, CodeTuning, copy_into, everywhere

DECAY = 0.95
"""Of the mean of squared gradients."""


@MODEL_TUNINGS.register("straight_through")
class StraightThrough(CodeTuning):
    """All codes follow real weights, which take the gradients of the decoded ones."""

    type: Literal["straight_through"] = "straight_through"
    weight_rate: float = Field(
        0.01, gt=0, le=1, description="step size of the real weights over their root mean square"
    )

    def __call__(self, task: ModelTask) -> JSON:
        return _StraightThroughLoop(self, task).train()


class _StraightThroughLoop(CodeLoop):
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
            matrix.set_codes(matrix.nearest(X_NE, where_N), where_N)

    def _record(self) -> JSON:
        return {**super()._record(), "moves": self._moves}

    def _state(self) -> tuple[JSON, dict[str, Tensor]]:
        record, tensors = super()._state()
        return record, tensors | named("squares", self._squares)

    def _load(self, record: JSON, tensors: Mapping[str, Tensor]) -> None:
        super()._load(record, tensors)
        self._moves = record["moves"]
        copy_into(self._squares, under("squares", tensors))
