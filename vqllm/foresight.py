"""What is found out about the whole model before its first layer is quantized.

One pass with gradients through the unquantized model tells what each token weighs in the Hessians,
what errors in each output do, and what errors in each linear do, from which a budget of bits is
spread. All of it is kept with the run, and read back when it goes on.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vqllm.allocation import Item, allocate, gaussian_mse
from vqllm.calibration.gradients import GradientPass, Visitor
from vqllm.calibration.saliency import OutputHessians, TokenWeights
from vqllm.calibration.sensitivity import Sensitivity
from vqllm.checkpoint.run import CheckpointRun
from vqllm.expected_loss import expected_losses
from vqllm.job import Job
from vqllm.preflight import Shape, chosen, option_costs
from vqllm.progress import Progress
from vqllm.recipe import Recipe
from vqllm.types import Codec, OutputRounding

logger = logging.getLogger(__name__)


def needs_gradients(recipe: Recipe) -> bool:
    """Whether a pass with gradients comes before the quantization."""
    return (
        recipe.hessian.weights == "output"
        or recipe.allocation is not None
        or isinstance(recipe.rounding, OutputRounding)
    )


@dataclass(frozen=True)
class Allocated:
    """What a linear got of a budget."""

    codec: Codec
    expected_kl: float
    """nats a token that errors in this linear alone add to the KL divergence of the predictions"""


class Foresight:
    """The findings of a run, each made when it is first asked for.

    `tokens` are the calibration sequences, int64 [S, L].
    """

    def __init__(self, job: Job, run: CheckpointRun, tokens: Tensor, progress: Progress) -> None:
        self._job = job
        self._run = run
        self._tokens = tokens
        self._progress = progress
        self._found: dict[str, Tensor] = {}
        if needs_gradients(job.recipe):
            progress.phase("gradients of the predictions")
            self._found = run.keep("gradients", self._gradients)

    def token_weights(self) -> dict[str, Tensor]:
        """What each calibration token weighs in the Hessians of each linear, float32 [S, L] by
        full name; empty if all weigh the same."""
        return self._part("weights")

    def outputs(self, index: int) -> dict[str, Tensor]:
        """The packed Hessians of a layer's outputs; empty if the rounding rule asks for none."""
        if not isinstance(self._job.recipe.rounding, OutputRounding):
            return {}
        outputs = self._run.kept(_outputs_file(index))
        if outputs is None:  # the file is damaged
            self._gradients()
            outputs = self._run.kept(_outputs_file(index))
            assert outputs is not None, "it was just written"
        return outputs

    def allocation(self, shapes: Mapping[str, Shape]) -> dict[str, "Allocated"]:
        """The codec of each linear, by full name; empty if all have the recipe's.

        Args:
            shapes: of all linears that are to be quantized.
        """
        recipe = self._job.recipe
        if recipe.allocation is None:
            return {}
        chosen = self._run.keep("allocation", lambda: self._allocate(shapes))
        codecs = recipe.allocation.codecs
        return {
            name: Allocated(codecs[int(number)], float(kl)) for name, (number, kl) in chosen.items()
        }

    def _part(self, kind: str) -> dict[str, Tensor]:
        prefix = f"{kind}/"
        return {
            key.removeprefix(prefix): tensor
            for key, tensor in self._found.items()
            if key.startswith(prefix)
        }

    def _gradients(self) -> dict[str, Tensor]:
        job, recipe = self._job, self._job.recipe
        scratch = self._run.scratch
        gradients = GradientPass(
            lambda: job.open_stream(scratch),
            self._tokens,
            recipe.seed,
            job.activation_budget,
            scratch / "gradients",
        )
        found: dict[str, TokenWeights | Sensitivity] = {}
        if recipe.hessian.weights == "output":
            found["weights"] = TokenWeights(self._tokens, recipe.hessian.power)
        if recipe.allocation is not None:
            found["loss"] = self._sensitivity()
        visitors: list[Visitor] = [*found.values()]
        if isinstance(recipe.rounding, OutputRounding):
            visitors.append(
                OutputHessians(
                    lambda index, blocks: self._run.put(_outputs_file(index), blocks),
                    recipe.hessian.power,
                )
            )
        gradients.run(lambda linears: chosen(linears, recipe), visitors, self._progress.share)
        return {
            f"{kind}/{name}": tensor
            for kind, visitor in found.items()
            for name, tensor in visitor.result().items()
        }

    def _sensitivity(self) -> Sensitivity:
        recipe = self._job.recipe
        mse = [gaussian_mse(codec) for codec in recipe.codecs]
        return Sensitivity(
            lambda name, W_RC, hessians: expected_losses(name, W_RC, hessians, recipe, mse),
            self._tokens.numel(),
            recipe.hessian.power if recipe.hessian.weights == "output" else 0.0,
        )

    def _allocate(self, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """By full name the number of the codec in the recipe's list, and the expected KL
        divergence in nats a token that its errors cause."""
        allocation = self._job.recipe.allocation
        assert allocation is not None, "asked for"
        losses = self._part("loss")
        num = len(allocation.codecs)
        items = [
            Item(option_costs(shape, self._job.recipe), tuple(losses[name].tolist() or [0.0] * num))
            for name, shape in shapes.items()
        ]
        numel = sum(rows * cols for rows, cols in shapes.values())
        least = sum(min(item.costs) for item in items)
        picks = allocate(items, max(allocation.bits * numel, least))
        spent = sum(item.costs[pick] for item, pick in zip(items, picks))
        expected = sum(item.losses[pick] for item, pick in zip(items, picks))
        logger.info(
            "%d linears share %.4f bits a weight; expected KL divergence %.3g",
            len(items),
            spent / numel,
            expected,
        )
        return {
            name: torch.tensor([pick, item.losses[pick]], dtype=torch.float64)
            for name, item, pick in zip(shapes, items, picks)
        }


def _outputs_file(index: int) -> str:
    return f"outputs-{index}"
