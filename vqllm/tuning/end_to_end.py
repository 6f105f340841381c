"""Codes fixed, all that is continuous trained: a model that predicts what the original predicts.

Adam on the mean KL divergence of the predictions. A look at the held-out sequences every tenth
of the way tells which state was the best one, and that is where the parameters end. A loss or a
gradient that is not finite takes the run back to the last look with half the rates; the third time
ends it.

Sources: Tseng et al., "QuIP#", arXiv 2402.04396, section 5 (sign and scale vectors and norms,
trained end to end); Malinovskii et al., "PV-Tuning", arXiv 2405.14852 (KL divergence from the
original as the objective).
"""

import logging
import math
import time
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vqllm.core import rng
from vqllm.core.protocols import JSON
from vqllm.errors import ModelError
from vqllm.tuning.base import (
    MODEL_TUNINGS,
    Duration,
    ModelTask,
    ModelTuning,
    looked_at,
    seconds_of,
)
from vqllm.tuning.divergence import divergence

logger = logging.getLogger(__name__)

Kind = Literal["rows", "columns", "vectors", "head", "codebooks"]

LOOKS = 10
WARM_UP = 0.05
"""Share of the way on which the rates rise from 0."""
MAX_FAULTS = 3
LOGIT_BYTES = 1 << 28
"""Of the logits of sequences that run together, counted in float32."""


class Descent(ModelTuning):
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
        return Run(self, task).run()


@MODEL_TUNINGS.register("end_to_end")
class EndToEnd(Descent):
    """Scales, norms and biases, optionally codebooks and head, trained against the original's
    predictions."""

    type: Literal["end_to_end"] = "end_to_end"


class Run:
    """A stage on its way. Its state is what `_state` says, and nothing else."""

    MOMENTUM = 0.9

    def __init__(self, stage: Descent, task: ModelTask) -> None:
        stage.check(task.parameters)
        self._stage, self._task, self._processes = stage, task, task.processes
        self._parameters: dict[str, nn.Parameter] = {}
        groups = []
        for kind in dict.fromkeys(stage.train):  # one that is named twice moves once
            for name, parameter in task.parameters.get(kind, {}).items():
                self._parameters[f"{kind}.{name}"] = parameter
                rate = stage.rate_of(kind)
                groups.append({"params": [parameter], "lr": rate, "full_rate": rate})
        # beta2 of 0.95, as in PV-Tuning: a few hundred steps are too few for 0.999.
        self._optimizer = torch.optim.Adam(groups, betas=(self.MOMENTUM, 0.95))
        self._step = self._faults = self._vocabulary = 0
        self._looked = -1
        self._factor, self._before = 1.0, 0.0
        self._history: list[JSON] = []
        self._best: dict[str, Tensor] = {}
        self._losses: list[float] = []
        self._start = time.monotonic()

    def run(self) -> JSON:
        if kept := self._task.keeper.last():
            self._load(*kept)
            self._say("tuning goes on at step %d of %d", self._step, self._stage.steps)
        while not (self._is_over() and self._was_looked_at()):
            if self._is_due():
                self._look()
            elif not self._advance():
                self._go_back()
            self._task.share(self._progress())
        self._restore(self._best)
        return self._told()

    def _told(self) -> JSON:
        best = min(self._history, key=lambda look: look["held_out_kl"])
        return {"history": self._history, "best_step": best["step"], "faults": self._faults}

    def _is_due(self) -> bool:
        """Whether it is time for a look."""
        if self._was_looked_at():
            return False
        return self._is_over() or (self._may_look() and self._tenth() > self._looked)

    def _may_look(self) -> bool:
        """Whether the state is one that a run can go on from."""
        return True

    def _was_looked_at(self) -> bool:
        return bool(self._history) and self._history[-1]["step"] == self._step

    def _tenth(self) -> int:
        """How many of the parts of the way after which to look are done."""
        return int(LOOKS * self._progress() + 1e-9)

    def _is_over(self) -> bool:
        return self._faults >= MAX_FAULTS or self._progress() >= 1

    def _progress(self) -> float:
        """Share of the way that is done: by steps, or by time where that is shorter."""
        done = self._step / self._stage.steps
        if self._stage.time is not None:
            done = max(done, self._elapsed() / (seconds_of(self._stage.time) or 1))
            # Clocks differ, and all must stop at the same step.
            own = torch.tensor(done if self._processes.is_first else 0.0, device=self._task.device)
            done = float(self._processes.sum(own))
        return min(done, 1.0)

    def _elapsed(self) -> float:
        return self._before + time.monotonic() - self._start

    def _look(self) -> None:
        """Measure on held-out sequences, remember the best state, and keep all of it."""
        with torch.no_grad():
            loss = self._mean_loss(looked_at(self._task.held_out))
        recent = sum(self._losses) / len(self._losses) if self._losses else None
        if not math.isfinite(loss):
            self._go_back()
            return
        self._looked = self._tenth()
        if loss < min((look["held_out_kl"] for look in self._history), default=math.inf):
            self._best = self._copies()
        self._history.append({"step": self._step, "train_kl": recent, "held_out_kl": loss})
        self._say(
            "step %d of %d: KL %.4f on held-out sequences%s",
            self._step,
            self._stage.steps,
            loss,
            "" if recent is None else f", {recent:.4f} on the last batches",
        )
        self._losses = []
        self._task.keeper.save(*self._state())

    def _mean_loss(self, sequences_SL: Tensor) -> float:
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
        if self._stage.together is not None:
            return self._stage.together
        if self._vocabulary == 0:
            with torch.no_grad():
                one = self._task.teacher(sequences_SL[:1].to(self._task.device))
            self._vocabulary = one.shape[-1]
        return max(1, LOGIT_BYTES // (4 * self._vocabulary * sequences_SL.shape[1]))

    def _advance(self) -> bool:
        """One step; False if something was not finite, and what moved must be taken back."""
        stage = self._stage
        done = min(1.0, self._progress() + 1 / stage.steps)
        rising = min(1.0, done / WARM_UP)
        for group in self._optimizer.param_groups:
            falling = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
            group["lr"] = group["full_rate"] * self._factor * rising * max(falling, 1e-3)
        self._optimizer.zero_grad(set_to_none=True)
        tokens_SL = self._task.sequences[self._batch()]
        total = torch.zeros(1, device=self._task.device)
        for part, weight in self._parts(tokens_SL):
            loss = weight * self._loss(part) / tokens_SL.numel()
            loss.backward()
            total += loss.detach()
        if not self._gather(total):
            return False
        self._optimizer.step()
        self._step += 1
        self._losses.append(float(total))
        return self._after_step()

    def _after_step(self) -> bool:
        """Move what else moves; False as in `_advance`."""
        return True

    def _gather(self, total: Tensor) -> bool:
        """Sum loss and gradients over the processes, in place; whether all of it is finite."""
        parameters = list(self._parameters.values())
        for parameter in parameters:
            if parameter.grad is None:  # where this process had no sequence of the step
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self._processes.size > 1:
            flat = torch.cat([total, *(grad.flatten() for grad in grads)])
            parts = self._processes.sum(flat).split([1, *(grad.numel() for grad in grads)])
            for own, summed in zip([total, *grads], parts):
                own.copy_(summed.view_as(own))
        return all(bool(values.isfinite().all()) for values in (total, *grads))

    def _say(self, line: str, *values: object, level: int = logging.INFO) -> None:
        if self._processes.is_first:
            logger.log(level, line, *values)

    def _batch(self) -> Tensor:
        """The sequences of this step: all of them once in random order, then again in another."""
        num, size = len(self._task.sequences), self._stage.batch
        first = self._step * size
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
        kept = self._task.keeper.last()
        if kept is None:
            raise ModelError(
                "the quantized model's predictions are not finite before the first step: the "
                "checkpoint is damaged, or its dtype is too narrow for this model."
            )
        faults, factor = self._faults + 1, self._factor / 2
        self._say(
            "step %d: loss or gradient is not finite; back to step %d with half the rates%s",
            self._step,
            kept[0]["step"],
            ", and stopped there" if faults >= MAX_FAULTS else "",
            level=logging.WARNING,
        )
        before = self._elapsed()
        self._load(*kept)
        self._faults, self._factor = faults, factor
        self._before, self._start = before, time.monotonic()

    def _copies(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self._parameters.items()}

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[name])

    def _state(self) -> tuple[JSON, dict[str, Tensor]]:
        """What a run goes on from. Its tensors are those at work, not copies of them all."""
        told = {
            "step": self._step,
            "faults": self._faults,
            "factor": self._factor,
            "looked": self._looked,
            "elapsed": self._elapsed(),
            "history": list(self._history),
        }
        tensors = {f"now.{name}": tensor for name, tensor in self._copies().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{key}.{name}"] = value.detach()
        return told, tensors

    def _load(self, told: JSON, tensors: Mapping[str, Tensor]) -> None:
        self._step, self._faults, self._factor = told["step"], told["faults"], told["factor"]
        self._looked = told["looked"]
        self._before, self._start = told["elapsed"], time.monotonic()
        self._history, self._losses = list(told["history"]), []
        self._restore(_under("now.", tensors))
        self._best = {
            name: tensor.to(self._task.device).clone()
            for name, tensor in _under("best.", tensors).items()
        }
        self._optimizer.state.clear()
        for key in ("step", "exp_avg", "exp_avg_sq"):
            for name, value in _under(f"adam.{key}.", tensors).items():
                parameter = self._parameters[name]
                device = torch.device("cpu") if key == "step" else parameter.device
                self._optimizer.state[parameter][key] = value.to(device, copy=True)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
