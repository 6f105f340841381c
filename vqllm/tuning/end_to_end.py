"""Codes fixed, all that is continuous trained: a model that predicts what the original predicts.

Adam on the mean KL divergence of the predictions (`adam_loop`). An evaluation on the held-out
sequences every tenth of the way tells which state was the best one, and that is where the
parameters end. A loss or a gradient that is not finite takes the run back to the last evaluation
with half the rates; the third time ends it.

Sources: Tseng et al., "QuIP#", arXiv 2402.04396, section 5 (sign and scale vectors and norms,
trained end to end); Malinovskii et al., "PV-Tuning", arXiv 2405.14852 (KL divergence from the
original as the objective).
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from vqllm.core import rng
from vqllm.core.protocols import JSON
from vqllm.errors import ModelError
from vqllm.tuning.adam_loop import AdamLoop, Evaluation, Schedule
from vqllm.tuning.base import (
    MODEL_TUNINGS,
    Duration,
    ModelTask,
    ModelTuning,
    evaluation_sequences,
    seconds_of,
)
from vqllm.tuning.divergence import divergence

Kind = Literal["rows", "columns", "vectors", "head", "codebooks"]

EVALUATIONS = 10
WARM_UP = 0.05
LOGIT_BYTES = 1 << 28
"""Of the logits of sequences that run together, counted in float32."""


class PredictionTuning(ModelTuning):
    """What stages that follow the original's predictions have in common."""

    train: tuple[Kind, ...] = Field(
        ("rows", "vectors"),
        min_length=1,
        description="rows: a scale for every output of every quantized linear; columns: one for "
        "every input; vectors: norms and biases; head: output head and embedding, where they are "
        "not quantized; codebooks: codebooks, tables and scales of groups, as the codec has them",
    )
    steps: int = Field(240, ge=1, description="steps of the optimizer")
    time: Duration | None = Field(
        None, description="stop after so long (90s, 20m, 1h30m) at the best state so far"
    )
    batch: int = Field(
        2, ge=1, description="sequences a step; more steps of few beat fewer steps of many"
    )
    rate: float = Field(
        3e-3,
        gt=0,
        le=1,
        description="step size of Adam for scales and vectors, relative to them",
    )
    head_rate: float = Field(
        1e-3, gt=0, le=1, description="that for the head, relative to its root mean square"
    )
    codebook_rate: float = Field(
        1e-3, gt=0, le=1, description="that for codebooks, relative to their root mean square"
    )
    together: int | None = Field(
        None,
        ge=1,
        description="sequences that run at a time; by default as many as have 2^28 bytes of logits",
    )

    checkpointing: bool = Field(
        False,
        description="keep only the inputs of layers for the gradients and compute the rest again: "
        "less memory, more time",
    )

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(self.train)

    @property
    def recomputes(self) -> bool:
        return self.checkpointing

    def rate_of(self, kind: str) -> float:
        """Step size of Adam for parameters of a kind."""
        return {"head": self.head_rate, "codebooks": self.codebook_rate}.get(kind, self.rate)

    def __call__(self, task: ModelTask) -> JSON:
        return PredictionLoop(self, task).train()


@MODEL_TUNINGS.register("end_to_end")
class EndToEnd(PredictionTuning):
    """Scales, norms and biases, optionally codebooks and head, trained against the original's
    predictions."""

    type: Literal["end_to_end"] = "end_to_end"


class PredictionLoop(AdamLoop):
    """A stage on its way."""

    MOMENTUM = 0.9

    def __init__(self, stage: PredictionTuning, task: ModelTask) -> None:
        stage.check(task.parameters)
        self._stage, self._task = stage, task
        parameters = {
            f"{kind}.{name}": (parameter, stage.rate_of(kind))
            for kind in dict.fromkeys(stage.train)  # one that is named twice moves once
            for name, parameter in task.parameters.get(kind, {}).items()
        }
        schedule = Schedule(
            steps=stage.steps, evaluations=EVALUATIONS, warm_up=WARM_UP, momentum=self.MOMENTUM
        )
        super().__init__(
            stage.type, parameters, schedule, task.processes, task.states, task.report_progress
        )
        self._vocabulary = 0
        """tokens that the original predicts; 0 before it was asked"""
        self._seconds_before = 0.0
        """that the training took before `_start`"""
        self._start = time.monotonic()

    def train(self) -> JSON:
        """Train; what the report says about it."""
        self.run()
        return self._report()

    def _report(self) -> JSON:
        history = [asdict(evaluation) for evaluation in self._history]
        best = self._best_evaluation.step
        return {"history": history, "best_step": best, "faults": self._faults}

    def _progress(self) -> float:
        """Share of the way that is done: by steps, or by time where that is shorter."""
        done = super()._progress()
        if self._stage.time is not None:
            done = max(done, self._elapsed() / (seconds_of(self._stage.time) or 1))
            # Clocks differ, and all must stop at the same step.
            own = torch.tensor(done if self._processes.is_first else 0.0, device=self._task.device)
            done = float(self._processes.sum(own))
        return min(done, 1.0)

    def _progress_after_step(self) -> float:
        return min(1.0, self._progress() + 1 / self._stage.steps)

    def _elapsed(self) -> float:
        return self._seconds_before + time.monotonic() - self._start

    def _held_out_loss(self) -> float:
        return self._mean_loss(evaluation_sequences(self._task.held_out))

    def _log_evaluation(self, evaluation: Evaluation) -> None:
        recent = evaluation.train_kl
        self._log(
            "step %d of %d: KL %.4f on held-out sequences%s",
            *(evaluation.step, self._stage.steps, evaluation.held_out_kl),
            "" if recent is None else f", {recent:.4f} on the last batches",
        )

    def _error_at_start(self) -> ModelError:
        return ModelError(
            "the quantized model's predictions are not finite before the first step: the "
            "checkpoint is damaged, or its dtype is too narrow for this model."
        )

    def _step_losses(self, step: int) -> Iterator[Tensor]:
        tokens_SL = self._task.sequences[self._batch(step)]
        for part, weight in self._parts(tokens_SL):
            yield weight * self._loss(part) / tokens_SL.numel()

    def _backward(self, loss: Tensor) -> None:
        # Of everything: codes take the gradients of weights, which are no parameters here.
        loss.backward()

    def _mean_loss(self, sequences_SL: Tensor) -> float:
        """The mean KL divergence over the positions of some sequences, over all processes."""
        total = torch.zeros((), device=self._task.device)
        for tokens, weight in self._parts(sequences_SL):
            total += weight * self._loss(tokens)
        return float(self._processes.sum(total)) / sequences_SL.numel()

    def _parts(self, sequences_SL: Tensor) -> list[tuple[Tensor, int]]:
        """What this process runs of some sequences, in parts, each with its weight: 1, or 0 where
        it only runs along with others that have more."""
        size = self._together(sequences_SL)
        own = self._processes.own(sequences_SL)
        parts = [(part, 1) for part in own.split(size) if len(part)]
        most = math.ceil(math.ceil(len(sequences_SL) / self._processes.size) / size)
        along = most - len(parts) if self._task.in_step else 0
        return parts + along * [(sequences_SL[:1], 0)]

    def _loss(self, tokens_SL: Tensor) -> Tensor:
        """The sum of KL divergences over the positions of some sequences."""
        tokens_SL = tokens_SL.to(self._task.device)
        with torch.no_grad():
            other = self._task.teacher(tokens_SL)
        own = self._task.student(tokens_SL)
        if own.shape != other.shape:
            raise ModelError(
                f"the teacher predicts {other.shape[-1]} tokens, the quantized model "
                f"{own.shape[-1]}: it is another model. Pass the original one."
            )
        return divergence(own, other)

    def _together(self, sequences_SL: Tensor) -> int:
        """How many of these sequences run at a time."""
        if self._stage.together is not None:
            return self._stage.together
        if self._vocabulary == 0:
            with torch.no_grad():
                one = self._task.teacher(sequences_SL[:1].to(self._task.device))
            self._vocabulary = one.shape[-1]
        return max(1, LOGIT_BYTES // (4 * self._vocabulary * sequences_SL.shape[1]))

    def _batch(self, step: int) -> Tensor:
        """The sequences of a step: all of them once in random order, then again in another."""
        num, size = len(self._task.sequences), self._stage.batch
        first = step * size
        orders: dict[int, Tensor] = {}
        rows = []
        for place in range(first, first + size):
            round_number = place // num
            if round_number not in orders:
                generator = rng.generator(self._task.seed, f"round {round_number}", "end_to_end")
                orders[round_number] = torch.randperm(num, generator=generator)
            rows.append(orders[round_number][place % num])
        return torch.stack(rows)

    def _go_back(self) -> None:
        # Time does not go back.
        elapsed = self._elapsed()
        super()._go_back()
        self._seconds_before, self._start = elapsed, time.monotonic()

    def _record(self) -> JSON:
        return {**super()._record(), "elapsed": self._elapsed()}

    def _load(self, record: JSON, tensors: Mapping[str, Tensor]) -> None:
        super()._load(record, tensors)
        self._seconds_before, self._start = record["elapsed"], time.monotonic()
