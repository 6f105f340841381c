"""What stages that move codes have in common: gradients of the weights, gathered in rounds."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vqllm.core.protocols import JSON
from vqllm.errors import ModelError
from vqllm.tuning.adam_loop import named, under
from vqllm.tuning.base import CODES, CodedMatrix, ModelTask
from vqllm.tuning.end_to_end import Kind, PredictionLoop, PredictionTuning


class CodeTuning(PredictionTuning):
    """Steps on what is continuous, and after a round of them one on the codes."""

    train: tuple[Kind, ...] = Field(
        ("rows", "vectors", "codebooks"),
        min_length=1,
        description="what moves between two steps on the codes: as in end_to_end",
    )
    every: int = Field(
        8, ge=1, description="steps of a round: their gradients together move the codes"
    )

    @model_validator(mode="after")
    def _moves_codes(self) -> Self:
        if self.every > self.steps:
            raise ValueError(
                f"every {self.every} with {self.steps} steps never moves a code; allowed is 1 to "
                f"{self.steps}, the number of steps"
            )
        return self

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset({*self.train, CODES})


class CodeLoop(PredictionLoop):
    """Codes belong to the state, and the real weights that they follow, which begin as the decoded
    ones. An evaluation falls between two rounds, so that a run that goes on there has missed
    nothing."""

    MOMENTUM = 0.0
    """The mean of earlier gradients is that of other codes: with 0.9 of it, half of the P steps of
    the test of one matrix led uphill."""

    def __init__(self, stage: CodeTuning, task: ModelTask) -> None:
        if not task.codes:
            raise ModelError("no codes to move: no linear of the layers is quantized.")
        super().__init__(stage, task)
        self._every = stage.every
        with torch.no_grad():
            tiles = {name: matrix.tiles() for name, matrix in task.codes.items()}
        self._real = {name: X_IJE.flatten(0, 1).clone() for name, X_IJE in tiles.items()}
        """[I·J, E] by matrix"""
        for matrix in task.codes.values():
            matrix.records_gradients = True

    def run(self) -> None:
        try:
            super().run()
        finally:
            for matrix in self._task.codes.values():
                matrix.records_gradients = False

    def _may_evaluate(self) -> bool:
        return self._step % self._every == 0

    def _after_step(self) -> bool:
        if self._step % self._every:
            return True
        gradients = {
            name: self._processes.sum(matrix.take_gradient()).flatten(0, 1)
            for name, matrix in self._task.codes.items()
        }
        # Those of what is continuous can be finite where these are not: a scale's is a sum.
        good = all(bool(gradient_NE.isfinite().all()) for gradient_NE in gradients.values())
        if good:
            self._move_codes(gradients)
        return good

    @abstractmethod
    def _move_codes(self, gradients: dict[str, Tensor]) -> None:
        """A step on the codes.

        Args:
            gradients: of the tiles of each matrix, the sum over a round and all processes, float32
                [I·J, E]; each may be taken out when it is no longer needed.
        """

    def _copies(self) -> dict[str, Tensor]:
        codes = {
            f"{CODES}.{name}": matrix.codes_at(everywhere(matrix))
            for name, matrix in self._task.codes.items()
        }
        return super()._copies() | codes

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        super()._restore(tensors)
        for name, matrix in self._task.codes.items():
            matrix.set_codes(tensors[f"{CODES}.{name}"].to(self._task.device), everywhere(matrix))
            matrix.take_gradient()

    def _state(self) -> tuple[JSON, dict[str, Tensor]]:
        record, tensors = super()._state()
        return record, tensors | named("real", self._real)

    def _load(self, record: JSON, tensors: Mapping[str, Tensor]) -> None:
        super()._load(record, tensors)
        copy_into(self._real, under("real", tensors))


def copy_into(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Give the tensors of each matrix these values, in place."""
    for name, X_NE in own.items():
        X_NE.copy_(values[name])


def everywhere(matrix: CodedMatrix) -> Tensor:
    """All places of a matrix, int64 [I·J]."""
    num_rows, num_cols = matrix.grid
    return torch.arange(num_rows * num_cols)
