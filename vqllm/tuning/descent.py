"""Adam with looks at held-out data: the best state is what stays.

A loss or a gradient that is not finite takes the parameters back to the best state with half the
rates; the third time ends it. So do looks that find no better state, several one after the other.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from vqllm.core import rng
from vqllm.core.distributed import Processes
from vqllm.core.protocols import JSON
from vqllm.errors import ModelError, NumericalError

logger = logging.getLogger(__name__)

LOOKS = 8
PATIENCE = 3
"""Looks without a better state that end it."""
WARM_UP = 0.1
"""Share of the way on which the rates rise from 0."""
MAX_FAULTS = 3


Loss = Callable[[int], Iterable[Tensor]]


def descend(
    parameters: Sequence[tuple[Tensor, float]],
    steps: int,
    loss: Loss,
    look: Callable[[], float],
    name: str,
    processes: Processes | None = None,
) -> JSON:
    """Move parameters in place, to where the held-out loss was least.

    Args:
        parameters: leaves that require gradients, each with the step size of Adam.
        loss: of a step, by its number, in parts whose sum it is; those of processes are summed too.
        look: the loss on held-out data, the same in all processes.
        name: of what is trained, for messages.

    Returns:
        the held-out loss "before" and "after", the "best_step" and the number of "faults".

    Raises:
        NumericalError: the held-out loss is not finite before the first step.
        ModelError: the loss does not depend on what is trained, or is computed without gradients.
    """
    return _Descent(parameters, steps, name, processes or Processes()).run(loss, look)


def batch(step: int, size: int, num: int, seed: int, name: str) -> Tensor:
    """Which of `num` sequences a step takes, int64 [`size`]: all of them once in random order, then
    again in another. What is left over of a round is not taken."""
    size = min(size, num)
    round_number, place = divmod(step, num // size)
    generator = rng.generator(seed, name, f"round {round_number}")
    return torch.randperm(num, generator=generator)[place * size : (place + 1) * size]


class _Descent:
    def __init__(
        self,
        parameters: Sequence[tuple[Tensor, float]],
        steps: int,
        name: str,
        processes: Processes,
    ) -> None:
        self._parameters = [parameter for parameter, _ in parameters]
        groups = [{"params": [p], "lr": rate, "full_rate": rate} for p, rate in parameters]
        # beta2 of 0.95, as end to end: so few steps are too few for 0.999.
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        self._steps, self._name, self._processes = steps, name, processes
        self._step = self._best_step = self._faults = 0
        self._factor = 1.0

    def run(self, loss: Loss, look: Callable[[], float]) -> JSON:
        before = least = self._look(look)
        if not math.isfinite(before):
            raise NumericalError(
                f"{self._name}: its output is not finite before the first step of its training: "
                "the weights are damaged, or the dtype in which it runs is too narrow for it "
                "(vqllm quantize has --compute-dtype float32)."
            )
        best, num_worse = self._copies(), 0
        while self._step < self._steps and self._faults < MAX_FAULTS and num_worse < PATIENCE:
            found = least
            if good := self._advance(loss):
                self._step += 1
                if self._step * LOOKS // self._steps > (self._step - 1) * LOOKS // self._steps:
                    found = self._look(look)
                    num_worse += 1
                    good = math.isfinite(found)
            if not good:
                self._go_back(best)
                num_worse = 0
            elif found < least:
                best, least, num_worse = self._copies(), found, 0
                self._best_step = self._step
        self._restore(best)
        told = {"before": before, "after": least, "best_step": self._best_step}
        return {**told, "faults": self._faults}

    def _look(self, look: Callable[[], float]) -> float:
        with torch.no_grad():
            return look()

    def _advance(self, loss: Loss) -> bool:
        """One step; False if something was not finite, and nothing moved."""
        done = (self._step + 1) / self._steps
        for group in self._optimizer.param_groups:
            falling = 0.5 * (1 + math.cos(math.pi * done))
            group["lr"] = group["full_rate"] * self._factor * min(1.0, done / WARM_UP)
            group["lr"] *= max(falling, 1e-3)
        total = torch.zeros((), device=self._parameters[0].device)
        sums = [torch.zeros_like(parameter) for parameter in self._parameters]
        with torch.enable_grad():
            for part in loss(self._step):
                total += part.detach()
                if not part.requires_grad:
                    raise ModelError(
                        f"{self._name} cannot be trained: the model computes it without gradients. "
                        "Leave out `layer`, or the stage of that type."
                    )
                # Not backward(): that would leave gradients in whatever else asks for them.
                grads = torch.autograd.grad(part, self._parameters, allow_unused=True)
                for own, grad in zip(sums, grads):
                    if grad is not None:
                        own += grad
        total, *sums = (self._processes.sum(values) for values in (total, *sums))
        good = all(bool(values.isfinite().all()) for values in (total, *sums))
        if good:
            for parameter, own in zip(self._parameters, sums):
                parameter.grad = own
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return good

    def _go_back(self, best: Sequence[Tensor]) -> None:
        self._faults += 1
        self._factor /= 2
        if self._processes.is_first:
            logger.warning(
                "%s: loss or gradient is not finite after step %d; back to step %d with half the "
                "rates%s",
                *(self._name, self._step, self._best_step),
                ", and stopped there" if self._faults >= MAX_FAULTS else "",
            )
        self._restore(best)
        self._optimizer.state.clear()
        self._step = self._best_step

    def _copies(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]

    def _restore(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._parameters, values):
                parameter.copy_(value)
