"""Measurements with gradients on the whole model, before its first layer is quantized.

One pass with gradients through the unquantized model gives up to three things: the weight of each
token in the Hessians, the curvature of the loss in the outputs of each linear, and the loss that
errors in each linear are expected to cause. From the last one a budget of bits is shared out among
the linears. All of it is stored in the run's folder, and read back when the run goes on.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from vqllm.allocation.choose_codecs import Allocated, choose_codecs
from vqllm.allocation.distortion import gaussian_mse
from vqllm.allocation.expected_loss import expected_losses
from vqllm.allocation.sensitivity import Sensitivity
from vqllm.calibration.gradients import GradientPass
from vqllm.calibration.layer_calls import States
from vqllm.calibration.saliency import OutputHessians, TokenWeights
from vqllm.calibration.visitors import Findings, Visitor
from vqllm.checkpoint.resume.shared_run import SharedRun
from vqllm.core.progress import Progress
from vqllm.core.protocols import OutputRounding
from vqllm.plan.cuts import divided
from vqllm.plan.job import Job
from vqllm.plan.selection import Selection
from vqllm.recipes import Recipe

logger = logging.getLogger(__name__)

STATE = "gradients"
"""Name of the stored state of the pass: the layer it has come to, and the gradient there."""
BESIDE = "gradient in "
"""Before the names of gradients in what layers need beside the hidden states."""


def needs_gradients(recipe: Recipe) -> bool:
    """Whether a pass with gradients comes before the quantization."""
    return (
        recipe.hessian.weights == "output"
        or recipe.allocation is not None
        or isinstance(recipe.rounding, OutputRounding)
    )


class GradientStatistics:
    """The results of the pass with gradients, for the quantization of the layers.

    The pass itself runs when an object is made, unless the run's folder has its results.

    `selection` are the linears that are to be quantized, `tokens` the calibration sequences, int64
    [S, L].
    """

    def __init__(
        self,
        job: Job,
        run: SharedRun,
        selection: Selection,
        tokens: Tensor,
        progress: Progress,
    ) -> None:
        self._job = job
        self._run = run
        self._selection = selection
        self._tokens = tokens
        self._progress = progress
        if needs_gradients(job.recipe):
            progress.phase("gradients of the predictions")
            self._record = _Record(run)
            if not self._record.is_complete:
                self._gradients()

    def token_weights(self) -> dict[str, Tensor]:
        """The weight of each calibration token in the Hessians of each linear, float32 [S, L] by
        full name; empty if all weigh the same."""
        if self._job.recipe.hessian.weights != "output":
            return {}
        weights = self._of_all_layers("weights")
        # No weights where a linear does not read whole sequences, such as an expert.
        partial = [name for name, weight_SL in weights.items() if not weight_SL.numel()]
        if partial:
            logger.warning(
                "%d linears see only some tokens (%s, ...): in their Hessians tokens weigh as a "
                "router has them, or all the same",
                len(partial),
                min(partial),
            )
        return {name: weights[name] for name in sorted(weights.keys() - partial)}

    def outputs(self, index: int) -> dict[str, Tensor]:
        """The packed Hessians of a layer's outputs; empty if the rounding rule needs none."""
        if not isinstance(self._job.recipe.rounding, OutputRounding):
            return {}
        return self._of_layer("outputs", index)

    def allocation(self) -> dict[str, "Allocated"]:
        """The codec of each linear, by full name; empty if all have the recipe's."""
        recipe = self._job.recipe
        if recipe.allocation is None:
            return {}
        chosen = self._run.load("allocation")
        if chosen is None:
            losses = self._of_all_layers("loss")
            chosen = self._run.load_or_make(
                "allocation", lambda: choose_codecs(self._selection, losses, recipe)
            )
        codecs = recipe.allocation.codecs
        return {
            name: Allocated(codecs[int(number)], float(kl)) for name, (number, kl) in chosen.items()
        }

    def _of_all_layers(self, kind: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for index in range(self._record.num_layers):
            found |= self._of_layer(kind, index)
        return found

    def _of_layer(self, kind: str, index: int) -> dict[str, Tensor]:
        found = self._record.found(kind, index)
        if found is None:  # the file is damaged
            self._record = _Record(self._run, anew=True)
            self._gradients()
            found = self._record.found(kind, index)
            assert found is not None, "it was just written"
        return found

    def _gradients(self) -> None:
        """Run the pass, from the layer that the record has come to."""
        job, recipe = self._job, self._job.recipe
        scratch = self._run.scratch
        gradients = GradientPass(
            job.open_stream,
            self._tokens,
            recipe.seed,
            job.activation_budget,
            scratch / "gradients",
            self._run.processes,
        )
        # A visitor for each kind of result that the recipe needs; its results are stored under its
        # name here.
        visitors: dict[str, Visitor] = {}
        if recipe.hessian.weights == "output":
            visitors["weights"] = TokenWeights(
                self._tokens, recipe.hessian.power, self._run.processes
            )
        if recipe.allocation is not None:
            visitors["loss"] = self._sensitivity()
        if isinstance(recipe.rounding, OutputRounding):
            visitors["outputs"] = OutputHessians(recipe.hessian.power, self._tokens.numel())
        share = self._progress.share
        gradients.run(self._selection.of, visitors, self._record, share)

    def _sensitivity(self) -> Sensitivity:
        recipe = self._job.recipe
        mse = [gaussian_mse(codec) for codec in recipe.codecs]
        cuts = self._selection.cuts
        return Sensitivity(
            lambda name, W_RC, hessians: expected_losses(
                name, W_RC, hessians, divided(recipe, cuts.get(name)), mse
            ),
            self._tokens.numel(),
            recipe.hessian.power if recipe.hessian.weights == "output" else 0.0,
        )


class _Record:
    """The results of a pass with gradients, stored in the run's folder layer by layer.

    The pass goes from the last layer to layer 0, so it is complete when layer 0 is done.
    """

    def __init__(self, run: SharedRun, anew: bool = False) -> None:
        self._run = run
        if anew:
            run.save(STATE, {})
        state = run.load(STATE) or {"last": torch.tensor([-1, 0])}
        index, self.num_layers = state["last"].tolist()
        self.is_complete = index == 0

    def last(self) -> tuple[int, States | None] | None:
        """The layer that was finished last, and the gradient in its input."""
        state = self._run.load(STATE)
        if not state:
            return None
        index = int(state.pop("last")[0])
        hidden = state.pop("gradient", None)
        if hidden is None:
            return index, None
        return index, States(hidden, {key.removeprefix(BESIDE): g for key, g in state.items()})

    def finish(self, index: int, found: Mapping[str, Findings], gradient: States | None) -> None:
        """Store the results of layer `index`. `STATE` is written last: if the run is stopped before
        that, the layer counts as not done."""
        self.num_layers = self.num_layers or index + 1
        for kind, findings in found.items():
            self._run.save(f"{kind}-{index}", findings)
        state = {"last": torch.tensor([index, self.num_layers])}
        if gradient is not None:
            state |= {BESIDE + key: values for key, values in gradient.beside.items()}
            state["gradient"] = gradient.hidden
        self._run.save(STATE, state)
        self.is_complete = index == 0

    def found(self, kind: str, index: int) -> Findings | None:
        """The results of a layer; None if they cannot be read."""
        return self._run.load(f"{kind}-{index}")
