"""The training of one layer by Adam, its losses given as functions."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from vqllm.core import rng
from vqllm.core.distributed import Processes
from vqllm.core.protocols import JSON
from vqllm.errors import NumericalError
from vqllm.tuning.adam_loop import AdamLoop, Schedule

EVALUATIONS = 8
PATIENCE = 3
WARM_UP = 0.1

StepLosses = Callable[[int], Iterable[Tensor]]


def descend(
    parameters: Sequence[tuple[Tensor, float]],
    steps: int,
    losses: StepLosses,
    evaluate: Callable[[], float],
    name: str,
    processes: Processes | None = None,
) -> JSON:
    """Move parameters in place, to where the held-out loss was least.

    Args:
        parameters: leaves that require gradients, each with the step size of Adam.
        losses: of a step, by its number, in parts whose sum it is; those of processes are summed
            too.
        evaluate: the loss on held-out data, the same in all processes.
        name: of what is trained, for messages.

    Returns:
        the held-out loss "before" and "after", the "best_step" and the number of "faults".

    Raises:
        NumericalError: the held-out loss is not finite before the first step.
        ModelError: the loss does not depend on what is trained, or is computed without gradients.
    """
    schedule = Schedule(steps=steps, evaluations=EVALUATIONS, warm_up=WARM_UP, patience=PATIENCE)
    numbered = {str(number): given for number, given in enumerate(parameters)}
    loop = _LayerLoop(name, numbered, schedule, processes or Processes())
    return loop.train(losses, evaluate)


def batch(step: int, size: int, num: int, seed: int, name: str) -> Tensor:
    """Which of `num` sequences a step takes, int64 [`size`]: all of them once in random order, then
    again in another. What is left over of a round is not taken."""
    size = min(size, num)
    round_number, place = divmod(step, num // size)
    generator = rng.generator(seed, name, f"round {round_number}")
    return torch.randperm(num, generator=generator)[place * size : (place + 1) * size]


class _LayerLoop(AdamLoop):
    def train(self, losses: StepLosses, evaluate: Callable[[], float]) -> JSON:
        self._losses_of, self._evaluate_layer = losses, evaluate
        self.run()
        best = self._best_evaluation
        return {
            "before": self._history[0].held_out_kl,
            "after": best.held_out_kl,
            "best_step": best.step,
            "faults": self._faults,
        }

    def _step_losses(self, step: int) -> Iterable[Tensor]:
        return self._losses_of(step)

    def _held_out_loss(self) -> float:
        return self._evaluate_layer()

    def _error_at_start(self) -> NumericalError:
        return NumericalError(
            f"{self._name}: its output is not finite before the first step of its training: the "
            "weights are damaged, or the dtype in which it runs is too narrow for it (vqllm "
            "quantize has --compute-dtype float32)."
        )
