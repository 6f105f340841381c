"""Adam with evaluations on held-out data: the loop of all stages that train, whole models and
single layers alike. The best evaluated state is what stays.

    evaluate ─► steps ─► evaluate ─► steps ─► … ─► evaluate ─► the best of these states
                  │
                  └─ fault: back to the saved state, with half the rates

A loss or a gradient that is not finite is a fault; the third one ends the training.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from vqllm.core.distributed import Processes
from vqllm.core.protocols import JSON
from vqllm.errors import ModelError, VqllmError
from vqllm.tuning.base import StateStore

logger = logging.getLogger(__name__)

MAX_FAULTS = 3
LEAST_RATE = 1e-3
"""Of the full one, where the cosine would end at 0."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What Adam knows of a parameter."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a training is, how often it is evaluated, and at what rates it runs."""

    steps: int
    evaluations: int
    """evenly spread over the steps, and one before the first step"""
    warm_up: float
    """share of the steps during which the rates rise from 0; they fall as a cosine throughout"""
    patience: int | None = None
    """evaluations without a better state, one after the other, that end it; None: no number"""
    momentum: float = 0.9
    """beta1 of Adam"""

    def rate(self, full: float, done: float) -> float:
        """The step size where this share of the steps is done, `full` without warm-up and fall."""
        rising = min(1.0, done / self.warm_up)
        falling = 0.5 * (1 + math.cos(math.pi * done))
        return full * rising * max(falling, LEAST_RATE)


@dataclass(frozen=True)
class Evaluation:
    """What was measured at a step. The names are those in saved states and in reports, where the
    losses are the KL divergences of whole models."""

    step: int
    train_kl: float | None
    """mean loss of the steps since the evaluation before"""
    held_out_kl: float


class AdamLoop(ABC):
    """A training on its way. Its state is what `_state` returns, and nothing else.

    Attributes:
        _parameters: what is trained, by name.
        _step: how many steps are done.
        _factor: of the rates; each fault halves it.
        _history: the evaluations on the way to the present state.
        _best: copies of what moves, at the best of them.
    """

    def __init__(
        self,
        name: str,
        parameters: Mapping[str, tuple[Tensor, float]],
        schedule: Schedule,
        processes: Processes,
        states: StateStore | None = None,
        progress: Callable[[float], None] = lambda done: None,
    ) -> None:
        """Args:
        name: of what is trained, for messages.
        parameters: leaves that require gradients, each with the full step size of Adam.
        processes: share the work; all must have the same parameters.
        states: where the state is saved at every evaluation; a fault goes back to the last one,
            and a new run goes on from there. None: a fault goes back to the best state, without
            Adam's moments.
        progress: is called with the share of the training that is done, from 0 to 1.
        """
        self._name = name
        self._parameters = {key: parameter for key, (parameter, _) in parameters.items()}
        groups = [{"params": [p], "lr": rate, "full_rate": rate} for p, rate in parameters.values()]
        # beta2 of 0.95, as in PV-Tuning: a few hundred steps are too few for 0.999.
        self._optimizer = torch.optim.Adam(groups, betas=(schedule.momentum, 0.95))
        self._schedule, self._processes = schedule, processes
        self._states, self._report_progress = states, progress
        self._step = self._faults = 0
        self._evaluated_part = -1
        """the part of the way (`_part`) in which the last evaluation was"""
        self._factor = 1.0
        self._history: list[Evaluation] = []
        self._best: dict[str, Tensor] = {}
        self._best_record: JSON = {}
        self._losses: list[float] = []
        """of the steps since the last evaluation"""

    @abstractmethod
    def _step_losses(self, step: int) -> Iterable[Tensor]:
        """The loss of a step in parts, whose sum over all parts and processes it is. A part is
        computed when the gradient of the one before has been."""

    @abstractmethod
    def _held_out_loss(self) -> float:
        """The loss on held-out data, the same in all processes."""

    @abstractmethod
    def _error_at_start(self) -> VqllmError:
        """What is raised where the held-out loss is not finite before the first step."""

    def _log_evaluation(self, evaluation: Evaluation) -> None:
        """Tell the user what was measured."""
        line = "%s: step %d: held-out loss %.4g"
        self._log(line, self._name, evaluation.step, evaluation.held_out_kl, level=logging.DEBUG)

    def _may_evaluate(self) -> bool:
        """Whether the state is one that a run can go on from."""
        return True

    def _after_step(self) -> bool:
        """Move what has no gradient; False if something was not finite."""
        return True

    def run(self) -> None:
        """Train; the parameters end at the best evaluated state.

        Raises:
            VqllmError: the held-out loss is not finite before the first step, or what is trained
                is computed without gradients.
        """
        # An earlier process may have saved a state of this very training.
        if self._states is not None and (saved := self._states.load()):
            self._load(*saved)
            self._log("tuning goes on at step %d of %d", self._step, self._schedule.steps)
        # The last thing that happens is an evaluation, so that the last steps count.
        while not (self._is_over() and self._is_evaluated()):
            if self._is_evaluation_due():
                good = self._evaluate()
            else:
                good = self._advance()
            if not good:
                self._go_back()
            self._report_progress(self._progress())
        self._restore(self._best)

    @property
    def _best_evaluation(self) -> Evaluation:
        return min(self._history, key=lambda evaluation: evaluation.held_out_kl)

    def _progress(self) -> float:
        """Share of the way that is done."""
        return self._step / self._schedule.steps

    def _progress_after_step(self) -> float:
        """The same after one more step."""
        return (self._step + 1) / self._schedule.steps

    def _is_over(self) -> bool:
        if self._faults >= MAX_FAULTS or self._progress() >= 1:
            return True
        if self._schedule.patience is None or not self._history:
            return False
        since_best = len(self._history) - 1 - self._history.index(self._best_evaluation)
        return since_best >= self._schedule.patience

    def _is_evaluation_due(self) -> bool:
        if self._is_evaluated():
            return False
        return self._is_over() or (self._may_evaluate() and self._part() > self._evaluated_part)

    def _is_evaluated(self) -> bool:
        """Whether the present state is."""
        return bool(self._history) and self._history[-1].step == self._step

    def _part(self) -> int:
        """In which part of the way it is: there is an evaluation in each."""
        return int(self._schedule.evaluations * self._progress() + 1e-9)

    def _evaluate(self) -> bool:
        """Measure on held-out data, and save the state; False if the loss is not finite."""
        with torch.no_grad():
            loss = self._held_out_loss()
        if not math.isfinite(loss):
            return False
        self._evaluated_part = self._part()
        # Compare with the states before this one, then add it to them.
        is_best = not self._history or loss < self._best_evaluation.held_out_kl
        recent = sum(self._losses) / len(self._losses) if self._losses else None
        self._history.append(Evaluation(self._step, recent, loss))
        self._losses = []
        self._log_evaluation(self._history[-1])
        # Save what a fault, or a new process, goes on from.
        if is_best:
            self._best = self._copies()
        if self._states is not None:
            self._states.save(*self._state())
        elif is_best:
            self._best_record = self._record()
        return True

    def _advance(self) -> bool:
        """One step; False if something was not finite, and what moved must be taken back."""
        # The rates of this step.
        done = self._progress_after_step()
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.rate(group["full_rate"] * self._factor, done)
        # Loss and gradients, part by part: only one part's activations are in memory.
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=next(iter(self._parameters.values())).device)
        with torch.enable_grad():
            for part in self._step_losses(self._step):
                if not part.requires_grad:
                    raise ModelError(
                        f"{self._name} cannot be trained: the model computes it without gradients. "
                        "Leave out `layer`, or the stage of that type."
                    )
                self._backward(part)
                total += part.detach()
        # Nothing moves by what is not finite.
        good = self._sum_over_processes(total)
        if good:
            self._optimizer.step()
            self._step += 1
            self._losses.append(float(total))
        self._optimizer.zero_grad(set_to_none=True)
        return good and self._after_step()

    def _backward(self, loss: Tensor) -> None:
        """Add to the gradients of what is trained, and leave none in what else asks for them."""
        loss.backward(inputs=list(self._parameters.values()))

    def _sum_over_processes(self, total: Tensor) -> bool:
        """Sum loss and gradients over the processes, in place; whether all of it is finite."""
        parameters = list(self._parameters.values())
        for parameter in parameters:
            if parameter.grad is None:  # the loss, or what this process had of it, ignores it
                parameter.grad = torch.zeros_like(parameter)
        sums = [total, *(p.grad for p in parameters if p.grad is not None)]
        if self._processes.size > 1:
            # In one message.
            flat = self._processes.sum(torch.cat([own.flatten() for own in sums]))
            for own, summed in zip(sums, flat.split([own.numel() for own in sums])):
                own.copy_(summed.view_as(own))
        return all(bool(values.isfinite().all()) for values in sums)

    def _go_back(self) -> None:
        """To the saved state, with half the rates."""
        saved = self._saved()
        if saved is None:
            raise self._error_at_start()
        faults, factor = self._faults + 1, self._factor / 2
        self._log(
            "%s: step %d: loss or gradient is not finite; back to step %d with half the rates%s",
            *(self._name, self._step, saved[0]["step"]),
            ", and stopped there" if faults >= MAX_FAULTS else "",
            level=logging.WARNING,
        )
        self._load(*saved)
        self._faults, self._factor = faults, factor

    def _log(self, line: str, *values: object, level: int = logging.INFO) -> None:
        """Once, however many processes there are."""
        if self._processes.is_first:
            logger.log(level, line, *values)

    def _saved(self) -> tuple[JSON, Mapping[str, Tensor]] | None:
        if self._states is not None:
            return self._states.load()
        if not self._best:
            return None
        return self._best_record, named("now", self._best) | named("best", self._best)

    def _copies(self) -> dict[str, Tensor]:
        """Of everything that moves."""
        return {name: p.detach().clone() for name, p in self._parameters.items()}

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Let everything that moves be as in `_copies`."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[name])

    def _record(self) -> JSON:
        """The state without its tensors, as JSON values."""
        return {
            "step": self._step,
            "faults": self._faults,
            "factor": self._factor,
            "looked": self._evaluated_part,
            "history": [asdict(evaluation) for evaluation in self._history],
        }

    def _state(self) -> tuple[JSON, dict[str, Tensor]]:
        """What a training goes on from. Its tensors are those at work, not copies of them all."""
        tensors = named("now", self._copies()) | named("best", self._best)
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{key}.{name}"] = value.detach()
        return self._record(), tensors

    def _load(self, record: JSON, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `_state` returned."""
        self._step, self._faults, self._factor = record["step"], record["faults"], record["factor"]
        self._evaluated_part = record["looked"]
        self._history = [Evaluation(**values) for values in record["history"]]
        self._losses = []
        self._restore(under("now", tensors))
        device = next(iter(self._parameters.values())).device
        self._best = {name: own.to(device) for name, own in under("best", tensors).items()}
        self._optimizer.state.clear()
        for key in MOMENTS:
            for name, value in under(f"adam.{key}", tensors).items():
                parameter = self._parameters[name]
                # Adam counts its steps on the CPU.
                own_device = torch.device("cpu") if key == "step" else parameter.device
                self._optimizer.state[parameter][key] = value.to(own_device, copy=True)


def named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that a state has for them."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `named` added to a state, by its own names."""
    start = f"{prefix}."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
