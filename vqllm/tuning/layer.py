"""Codes fixed, one decoder layer after another trained to give what the original's layer gives.

    original    states ─► layer ─► wanted ─► next layer
    quantized   states ─► layer, trained ─► states ─► next layer

Gradients, Adam's moments and activations are those of one layer. What reaches the quantized layer
is what the layers before it, already tuned, give, so that it can take back some of their errors.

Source: Egiazarian et al., "AQLM", arXiv 2401.06118 (what is continuous in a block, trained against
the original block's output).
"""

import logging
import time
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vqllm.errors import ModelError
from vqllm.metrics import output_error
from vqllm.tuning.base import (
    MODEL_TUNINGS,
    DecoderLayers,
    Duration,
    ModelTask,
    ModelTuning,
    looked_at,
    seconds_of,
)
from vqllm.tuning.descent import batch, descend
from vqllm.types import JSON

logger = logging.getLogger(__name__)

CPU_TOKENS, TOKENS = 1024, 8192
"""Tokens that run together, on a CPU and elsewhere."""


@MODEL_TUNINGS.register("layer")
class Layer(ModelTuning):
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
    time: Duration | None = Field(
        None, description="train no further layer after so long (90s, 20m, 1h30m)"
    )
    batch: int = Field(4, ge=1, description="sequences a step")
    rate: float = Field(
        3e-3, gt=0, le=1, description="step size of Adam, relative to what is trained"
    )
    together: int | None = Field(
        None,
        ge=1,
        description="sequences that run at a time; by default 1024 tokens, 8192 on a GPU",
    )

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(self.train)

    @property
    def by_layers(self) -> bool:
        return True

    def __call__(self, task: ModelTask) -> JSON:
        return _Run(self, task).run()


class _Run:
    def __init__(self, stage: Layer, task: ModelTask) -> None:
        self._stage, self._task = stage, task
        assert task.teacher_layers is not None, "a model has layers"
        assert task.student_layers is not None, "a model has layers"
        self._teacher = task.teacher_layers()
        self._student = task.student_layers(self._teacher.names)
        length = task.sequences.shape[1]
        most = CPU_TOKENS if task.device.type == "cpu" else TOKENS
        self._together = stage.together or max(1, most // length)
        self._parts = task.sequences, looked_at(task.held_out)
        self._states: list[Tensor | None] = [None, None]
        """inputs of the quantized layer, for training and held-out sequences"""
        self._wanted: list[Tensor] = []
        self._layers: list[JSON] = []
        self._before, self._start = 0.0, time.monotonic()

    def run(self) -> JSON:
        names = self._student.names
        if not any(self._parameters(name) for name in names):
            raise ModelError(
                f"nothing to tune: the layers have none of {', '.join(self._stage.train)}. Add "
                "kinds to `train`."
            )
        num_done = 0
        if kept := self._task.keeper.last():
            num_done = self._load(*kept)
        theirs: list[Tensor | None] = [None, None]
        for index, name in enumerate(names):
            if index >= num_done and self._is_over():
                break
            inputs = theirs if self._stage.aim == "original" else self._states
            with self._teacher.ready(index):
                self._wanted = self._outputs(self._teacher, index, inputs)
            theirs = list(self._wanted)
            parameters = self._parameters(name)
            if index >= num_done and parameters:
                self._train(index, parameters)
                self._keep(index + 1)
            self._states = list(self._outputs(self._student, index, self._states))
            self._task.share((index + 1) / len(names))
        return {"layers": self._layers, "faults": sum(told["faults"] for told in self._layers)}

    def _elapsed(self) -> float:
        return self._before + time.monotonic() - self._start

    def _is_over(self) -> bool:
        """Whether time is up, as the first process has it, and at least one layer is trained."""
        if self._stage.time is None or not self._layers:
            return False
        is_over = self._elapsed() >= (seconds_of(self._stage.time) or 1)
        own = torch.tensor(float(is_over and self._task.processes.is_first))
        return bool(self._task.processes.sum(own.to(self._task.device)))

    def _parameters(self, layer: str) -> dict[str, nn.Parameter]:
        return {
            f"{kind}.{name}": parameter
            for kind in self._stage.train
            for name, parameter in self._task.parameters.get(kind, {}).items()
            if name.startswith(f"{layer}.")
        }

    def _train(self, index: int, parameters: dict[str, nn.Parameter]) -> None:
        stage, task, name = self._stage, self._task, self._student.names[index]

        def loss(step: int) -> Iterator[Tensor]:
            rows = batch(step, stage.batch, len(task.sequences), task.seed, name)
            yield from self._errors(index, 0, rows)

        def look() -> float:
            total = torch.zeros((), device=task.device)
            for part in self._errors(index, 1, torch.arange(len(self._parts[1]))):
                total += part
            return float(task.processes.sum(total))

        rates = [(parameter, stage.rate) for parameter in parameters.values()]
        told = descend(rates, stage.steps, loss, look, name, task.processes)
        self._layers.append({"layer": index, **told})
        if task.processes.is_first:
            line = "%s: error of its output on held-out sequences %.4g, trained %.4g"
            logger.info(line, name, told["before"], told["after"])

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

    def _outputs(
        self, layers: DecoderLayers, index: int, states: list[Tensor | None]
    ) -> list[Tensor]:
        """What a layer gives for all sequences, on the CPU."""
        return [
            torch.cat(
                [
                    self._run(layers, index, tokens, given, grad=False).cpu()
                    for tokens, given in self._split(part, own)
                ]
            )
            for part, own in zip(self._parts, states)
        ]

    def _split(
        self, tokens: Tensor, states: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        for start in range(0, len(tokens), self._together):
            rows = slice(start, start + self._together)
            yield tokens[rows], None if states is None else states[rows].to(self._task.device)

    def _run(
        self, layers: DecoderLayers, index: int, tokens: Tensor, states: Tensor | None, grad: bool
    ) -> Tensor:
        output = layers.run(index, tokens, states, grad=grad)
        assert output is not None, "nothing ends it early"
        return output

    def _keep(self, num_done: int) -> None:
        tensors = {
            name: parameter.detach().clone()
            for layer in self._student.names[:num_done]
            for name, parameter in self._parameters(layer).items()
        }
        told = {"num_done": num_done, "layers": self._layers, "elapsed": self._elapsed()}
        self._task.keeper.keep(told, tensors)

    def _load(self, told: JSON, tensors: dict[str, Tensor]) -> int:
        self._layers, self._before = list(told["layers"]), told["elapsed"]
        with torch.no_grad():
            for layer in self._student.names:
                for name, parameter in self._parameters(layer).items():
                    if name in tensors:
                        parameter.copy_(tensors[name])
        return told["num_done"]
