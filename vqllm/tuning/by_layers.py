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
    looked_at,
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
        self._parts = task.sequences, looked_at(task.held_out)
        self._states: list[Tensor | None] = [None, None]
        """inputs of the quantized layer, for training and held-out sequences"""
        self._layers: list[JSON] = []
        self._before, self._start = 0.0, time.monotonic()

    def run(self) -> JSON:
        """Tune layer after layer; what the report says of them."""
        names = self._student.names
        if not any(self._parameters(name) for name in names):
            wanted = ", ".join(sorted(self._stage.kinds))
            raise ModelError(
                f"nothing to tune: the layers have none of {wanted}. Add kinds to `train`."
            )
        num_done = 0
        if kept := self._task.keeper.last():
            num_done = self._load(*kept)
        for index, name in enumerate(names):
            if index >= num_done and self._is_over():
                break
            with self._teacher.ready(index) as theirs:
                self._look(index, theirs)
            parameters = self._parameters(name)
            if index >= num_done and parameters:
                self._train(index, parameters)
                self._keep(index + 1)
            self._states = list(self._outputs(self._student, index, self._states))
            self._task.share((index + 1) / len(names))
        return {"layers": self._layers, "faults": sum(told["faults"] for told in self._layers)}

    @abstractmethod
    def _look(self, index: int, theirs: object) -> None:
        """Take what is wanted of the original's layer, which is ready to run."""

    @abstractmethod
    def _train(self, index: int, parameters: dict[str, nn.Parameter]) -> None:
        """Move these parameters of the quantized layer, and add to `_layers` what came of it."""

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

    def _keep(self, num_done: int) -> None:
        tensors = {
            name: parameter.detach().clone()
            for layer in self._student.names[:num_done]
            for name, parameter in self._parameters(layer).items()
        }
        told = {"num_done": num_done, "layers": self._layers, "elapsed": self._elapsed()}
        self._task.keeper.save(told, tensors)

    def _load(self, told: JSON, tensors: dict[str, Tensor]) -> int:
        self._layers, self._before = list(told["layers"]), told["elapsed"]
        with torch.no_grad():
            for layer in self._student.names:
                for name, parameter in self._parameters(layer).items():
                    if name in tensors:
                        parameter.copy_(tensors[name])
        return told["num_done"]
