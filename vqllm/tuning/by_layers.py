"""Stages that go through a model layer by layer, beside the original's layers.

original    layer i ─► what the stage wants of it
quantized   states ─► layer i, tuned ─► states ─► layer i + 1
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from vqllm.core.protocols import JSON
from vqllm.errors import ModelError
from vqllm.tuning.base import (
    DecoderLayers,
    Duration,
    ModelTask,
    ModelTuning,
    evaluation_sequences,
    seconds_of,
)

CPU_TOKENS, TOKENS = 1024, 8192
"""Tokens that run together, on a CPU and elsewhere."""


class LayerTuning(ModelTuning):
    """Such a stage."""

    time: Duration | None = Field(
        None, description="tune no further layer after so long (90s, 20m, 1h30m)"
    )
    together: int | None = Field(
        None,
        ge=1,
        description="sequences that run at a time; by default 1024 tokens, 8192 on a GPU",
    )

    @property
    def by_layers(self) -> bool:
        return True


S = TypeVar("S", bound=LayerTuning)


class LayerRun(ABC, Generic[S]):
    """One run of such a stage."""

    def __init__(self, stage: S, task: ModelTask) -> None:
        self._stage, self._task = stage, task
        assert task.teacher_layers is not None, "a model has layers"
        assert task.student_layers is not None, "a model has layers"
        self._teacher = task.teacher_layers()
        self._student = task.student_layers(self._teacher.names)
        length = task.sequences.shape[1]
        most = CPU_TOKENS if task.device.type == "cpu" else TOKENS
        self._together = stage.together or max(1, most // length)
        self._parts = task.sequences, evaluation_sequences(task.held_out)
        self._states: list[Tensor | None] = [None, None]
        """inputs of the quantized layer, for training and held-out sequences"""
        self._layers: list[JSON] = []
        self._seconds_before, self._start = 0.0, time.monotonic()

    def run(self) -> JSON:
        """Tune layer after layer; what the report says of them."""
        names = self._student.names
        if not any(self._parameters(name) for name in names):
            wanted = ", ".join(sorted(self._stage.kinds))
            raise ModelError(
                f"nothing to tune: the layers have none of {wanted}. Add kinds to `train`."
            )
        num_done = 0
        if saved := self._task.states.load():
            num_done = self._load(*saved)
        for index, name in enumerate(names):
            if index >= num_done and self._is_over():
                break
            # The original's layer is in memory here only.
            with self._teacher.ready(index) as original:
                self._read_original(index, original)
            # A layer that an earlier run tuned has only to pass its states on.
            parameters = self._parameters(name)
            if index >= num_done and parameters:
                self._train(index, parameters)
                self._save(index + 1)
            self._states = list(self._outputs(self._student, index, self._states))
            self._task.report_progress((index + 1) / len(names))
        return {"layers": self._layers, "faults": sum(layer["faults"] for layer in self._layers)}

    @abstractmethod
    def _read_original(self, index: int, original: object) -> None:
        """Take what is wanted of the original's layer, which is ready to run."""

    @abstractmethod
    def _train(self, index: int, parameters: dict[str, nn.Parameter]) -> None:
        """Move these parameters of the quantized layer, and add to `_layers` what came of it."""

    def _elapsed(self) -> float:
        return self._seconds_before + time.monotonic() - self._start

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
            for kind in sorted(self._stage.kinds)
            for name, parameter in self._task.parameters.get(kind, {}).items()
            if name.startswith(f"{layer}.")
        }

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

    def _save(self, num_done: int) -> None:
        """What an interrupted run goes on from: the parameters of the layers that are done."""
        tensors = {
            name: parameter.detach().clone()
            for layer in self._student.names[:num_done]
            for name, parameter in self._parameters(layer).items()
        }
        record = {"num_done": num_done, "layers": self._layers, "elapsed": self._elapsed()}
        self._task.states.save(record, tensors)

    def _load(self, record: JSON, tensors: dict[str, Tensor]) -> int:
        """Go on from what `_save` saved; the number of layers that are done."""
        self._layers, self._seconds_before = list(record["layers"]), record["elapsed"]
        with torch.no_grad():
            for layer in self._student.names:
                for name, parameter in self._parameters(layer).items():
                    if name in tensors:
                        parameter.copy_(tensors[name])
        return record["num_done"]
