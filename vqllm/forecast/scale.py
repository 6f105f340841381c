"""From what was measured on a layer and a few sequences to the whole run: time, memory, disk."""

import math
from collections import Counter
from dataclasses import dataclass

from vqllm.allocation.gradient_statistics import needs_gradients
from vqllm.allocation.sensitivity import FEWEST_TOKENS, TOKENS_PER_FEATURE
from vqllm.calibration.data.calibration_set import held_out_of
from vqllm.calibration.saliency import BLOCK
from vqllm.core.protocols import OutputRounding
from vqllm.forecast.measure import Measured
from vqllm.hf.decoder_layers import layer_names
from vqllm.plan.job import Job
from vqllm.quantization.checks import Checked
from vqllm.tuning.base import seconds_of
from vqllm.tuning.descent import EVALUATIONS

BACKWARD = 3.0
"""Passes through a layer that one with gradients takes as long as."""
READ = 1e9
"""Bytes a second when models are loaded."""
START = 2.0
"""Seconds to make a model, besides reading it."""
PACKED = 1.5
"""How much longer a model with packed linears runs on a whole text."""
FLOAT_LOGITS = 6
"""Blocks of `perplexity.CHUNK_POSITIONS` logits in float32 at the same time."""


@dataclass(frozen=True)
class Scope:
    """How much a run has to do."""

    layers: int
    tokens: int
    """of calibration"""
    eval_tokens: int
    """0 where the result is not measured"""
    eval_length: int
    hidden: int
    vocabulary: int
    itemsize: int
    """bytes of an activation"""
    before: int
    """bytes of the source model"""
    after: int
    """of the checkpoint"""

    @classmethod
    def of(
        cls, job: Job, checked: Checked, windows: tuple[int, int] | None, evaluate: bool, after: int
    ) -> "Scope":
        """Args:
        windows: number and length of those that the result is measured on; None for held-out
            sequences.
        """
        calibration = job.recipe.calibration
        config = checked.tensors.blueprint.model.config.get_text_config()
        num, length = calibration.num_sequences, calibration.length
        number, window = windows or (held_out_of(num, length), length)
        return cls(
            layers=len(layer_names(checked.tensors.blueprint.model)),
            tokens=num * length,
            eval_tokens=number * window if evaluate else 0,
            eval_length=window,
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            itemsize=2 if checked.tensors.blueprint.model.dtype.itemsize == 2 else 4,
            before=checked.tensors.num_bytes(),
            after=after,
        )

    @property
    def states(self) -> int:
        """Bytes of the hidden states of all sequences."""
        return self.tokens * self.hidden * self.itemsize


def seconds(job: Job, checked: Checked, measured: Measured, scope: Scope) -> dict[str, float]:
    """Seconds by stage."""
    recipe, trial = job.recipe, measured.trial
    found = {"calibration text": measured.text.seconds}
    if needs_gradients(recipe) and measured.found is not None:
        own = measured.found
        cols = max(cols for _, cols in checked.selection.shapes.values())
        enough = max(FEWEST_TOKENS, TOKENS_PER_FEATURE * cols)
        sampled = scope.tokens // max(1, scope.tokens // enough)
        found["gradients"] = (
            own.seconds + scope.tokens * own.seconds_a_token + sampled * own.seconds_a_sample
        )
    num_models = 1 if recipe.target.of == "weights" else 2
    counts = Counter(checked.selection.shapes.values())
    found["layers"] = scope.layers * (
        trial.loading + num_models * scope.tokens * trial.passes
    ) + sum(number * trial.seconds_of(shape) for shape, number in counts.items())
    if measured.ends:
        found["embedding and head"] = sum(measured.ends.values())
    if recipe.layer is not None:
        found["training of layers"] = scope.layers * _training(job, measured, scope)
    if recipe.tune is not None:
        found["tuning"] = _tuning(job, measured, scope)
    if scope.eval_tokens:
        forward = trial.forward * scope.layers
        found["evaluation"] = (
            2 * START
            + (scope.before + scope.after) / READ
            + scope.eval_tokens * (forward * (1 + PACKED) + measured.head)
        )
    return found


def _training(job: Job, measured: Measured, scope: Scope) -> float:
    """Seconds to train a layer between the roundings of its input groups."""
    settings = job.recipe.layer
    assert settings is not None, "asked for"
    length = job.recipe.calibration.length
    trained = settings.steps * settings.batch * length * BACKWARD
    held_out = (EVALUATIONS + 1) * settings.held_out * scope.tokens
    forward = measured.trial.forward
    # The original model's states are computed beside, once for the aim.
    return measured.trial.num_stages * (trained + held_out) * forward + scope.tokens * forward


def _tuning(job: Job, measured: Measured, scope: Scope) -> float:
    """Seconds of the stages on the whole model."""
    tune = job.recipe.tune
    assert tune is not None, "asked for"
    calibration, forward = tune.calibration, measured.trial.forward * scope.layers
    total = START + calibration.num_sequences * calibration.length * forward
    for stage in tune.stages:
        steps, batch = getattr(stage, "steps", 1), getattr(stage, "batch", 1)
        own = steps * batch * calibration.length * (BACKWARD * forward + 2 * measured.head)
        if (limit := getattr(stage, "time", None)) is not None:
            own = min(own, seconds_of(limit) or own)
        total += own
    return total


def peaks(job: Job, measured: Measured, scope: Scope) -> dict[str, int]:
    """Peak bytes of the process by stage; empty where the system does not measure them."""
    trial, base, few = measured.trial, measured.base_bytes, measured.text.tokens.numel()
    grows = (scope.tokens - few) * scope.hidden * scope.itemsize
    budget = job.activation_budget
    num_models = 1 if job.recipe.target.of == "weights" and job.recipe.layer is None else 2
    # Half of the budget is for states between layers, half for those inside of one.
    found = {"layers": trial.peak_bytes + 2 * min(num_models * grows, budget // 2)}
    if measured.text.peak_bytes:
        found["calibration text"] = measured.text.peak_bytes
    if needs_gradients(job.recipe) and measured.found is not None:
        inputs = min(scope.layers * grows, budget)
        # Beside the inputs of all layers the gradient in one, its copy, and that as a file.
        found["gradients"] = measured.found.peak_bytes + inputs + 3 * grows
    if scope.eval_tokens:
        logits = scope.vocabulary * scope.itemsize * scope.eval_length
        blocks = FLOAT_LOGITS * 4 * min(256, scope.eval_length) * scope.vocabulary
        found["evaluation"] = base + scope.before + scope.after + 2 * logits + blocks
    return found


def disk(job: Job, checked: Checked, scope: Scope, files: int) -> dict[str, int]:
    """Bytes in the output folder, by what they hold; only the first stays."""
    recipe, budget = job.recipe, job.activation_budget
    found = {"checkpoint": files}
    states = max(0, scope.states - budget // 2)
    if needs_gradients(recipe):
        inputs = scope.layers * scope.states
        states = max(states, inputs - budget if inputs > budget else 0) + scope.states
    if isinstance(recipe.rounding, OutputRounding):
        shapes = checked.selection.shapes.values()
        found["Hessians of outputs"] = sum(rows * min(rows, BLOCK) for rows, _ in shapes)
    if recipe.tune is not None:
        text = recipe.tune.calibration
        found["checkpoint before tuning"] = files
        if recipe.tune.teacher == "cached":
            found["predictions"] = 2 * scope.hidden * text.num_sequences * text.length
    if states:
        found["activations"] = math.ceil(states)
    return found
