"""Codes fixed, one decoder layer after another trained to give what the original's layer gives.

    original    states ─► layer ─► wanted ─► next layer
    quantized   states ─► layer, trained ─► states ─► next layer

Gradients, Adam's moments and activations are those of one layer. What reaches the quantized layer
is what the layers before it, already tuned, give, so that it can take back some of their errors.

Source: Egiazarian et al., "AQLM", arXiv 2401.06118 (what is continuous in a block, trained against
the original block's output).
"""

import logging
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vqllm.core.metrics import output_error
from vqllm.core.protocols import JSON
from vqllm.tuning.base import MODEL_TUNINGS, ModelTask
from vqllm.tuning.by_layers import LayerRun, LayerTuning
from vqllm.tuning.descent import batch, descend

logger = logging.getLogger(__name__)


@MODEL_TUNINGS.register("layer")
class Layer(LayerTuning):
    """Scales, norms and biases of each layer, trained against the original layer's output."""

    type: Literal["layer"] = "layer"
    train: tuple[Literal["rows", "columns", "vectors"], ...] = Field(
        ("rows", "vectors"),
        min_length=1,
        description="rows: a scale for every output of every quantized linear; columns: one for "
        "every input; vectors: norms and biases",
    )
    aim: Literal["original", "own"] = Field(
        "original",
        description="the original layer's output for the input that it has in the original model "
        "(original), or for the input that it has in the quantized one (own)",
    )
    steps: int = Field(48, ge=1, description="steps of Adam for each layer")
    batch: int = Field(4, ge=1, description="sequences a step")
    rate: float = Field(
        3e-3, gt=0, le=1, description="step size of Adam, relative to what is trained"
    )

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(self.train)

    def __call__(self, task: ModelTask) -> JSON:
        return _Run(self, task).run()


class _Run(LayerRun[Layer]):
    def __init__(self, stage: Layer, task: ModelTask) -> None:
        super().__init__(stage, task)
        self._wanted: list[Tensor] = []
        """outputs that the layer is to have"""
        self._original_states: list[Tensor | None] = [None, None]
        """inputs of the original's layer in the original model"""

    def _read_original(self, index: int, original: object) -> None:
        of_original = self._stage.aim == "original"
        inputs = self._original_states if of_original else self._states
        self._wanted = self._outputs(self._teacher, index, inputs)
        self._original_states = list(self._wanted)

    def _train(self, index: int, parameters: dict[str, nn.Parameter]) -> None:
        stage, task, name = self._stage, self._task, self._student.names[index]

        def losses(step: int) -> Iterator[Tensor]:
            rows = batch(step, stage.batch, len(task.sequences), task.seed, name)
            yield from self._errors(index, 0, rows)

        def evaluate() -> float:
            total = torch.zeros((), device=task.device)
            for part in self._errors(index, 1, torch.arange(len(self._parts[1]))):
                total += part
            return float(task.processes.sum(total))

        rates = [(parameter, stage.rate) for parameter in parameters.values()]
        trained = descend(rates, stage.steps, losses, evaluate, name, task.processes)
        self._layers.append({"layer": index, **trained})
        if task.processes.is_first:
            line = "%s: error of its output on held-out sequences %.4g, trained %.4g"
            logger.info(line, name, trained["before"], trained["after"])

    def _errors(self, index: int, part: int, rows: Tensor) -> Iterator[Tensor]:
        """The mean error of sequences by number, in pieces whose sum it is, as far as they are of
        this process."""
        grad = torch.is_grad_enabled()
        states = self._states[part]
        # In step, every process runs all of them.
        size = self._task.processes.size if self._task.in_step else 1
        mine = rows if self._task.in_step else self._task.processes.own(rows)
        for own in mine.split(self._together):
            if len(own):
                given = None if states is None else states[own].to(self._task.device)
                output = self._run(self._student, index, self._parts[part][own], given, grad)
                wanted = self._wanted[part][own].to(self._task.device)
                yield output_error(output, wanted) * (len(own) / (len(rows) * size))
