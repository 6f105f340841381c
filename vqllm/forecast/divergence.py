"""The KL divergence that a run is expected to have, and the ratio of perplexities."""

import math

from vqllm.core import threads
from vqllm.core.protocols import Codec
from vqllm.forecast.gradients import PassMeasured
from vqllm.forecast.measure import Measured
from vqllm.forecast.plan import Estimate
from vqllm.forecast.quality import error_of
from vqllm.plan.job import Job
from vqllm.quantization import embeddings as outside
from vqllm.quantization.checks import Checked
from vqllm.quantization.row_blocks import Matrix
from vqllm.recipes import Recipe

KAPPA = {"two_sided": 0.87}
"""Measured divergence over the sum of expected losses, by rounding rule; `OTHER` for those that are
not here. Of finished runs on the demo model: the `spread` recipes of 1.5 to 4 bits have 0.97, 0.86,
0.86, 0.85, 0.86 and 0.87."""
OTHER = 1.0
TRAINED_LAYERS = 0.94
"""What is left of it where layers are trained while they are rounded; 0.92 and 0.97 were measured
at 2 and 3 bits."""
TUNED = 0.9
"""The same of stages on the predictions: 0.87 and 0.95."""
BAND = 1.3
"""Between what the estimate divided by it and times it runs are expected to end."""
ROWS = 4096
"""Of an embedding or a head, whose mean square is taken."""


def kappa_of(recipe: Recipe) -> float:
    """Measured over expected divergence for a recipe of this kind."""
    kappa = KAPPA.get(recipe.rounding.type, OTHER)
    if recipe.layer is not None:
        kappa *= TRAINED_LAYERS
    return kappa if recipe.tune is None else kappa * TUNED


def expected_kl(job: Job, checked: Checked, measured: Measured) -> float | None:
    """Nats a token; None where nothing is known of what errors cost."""
    if measured.found is None:
        return None
    losses, recipe = measured.found.losses, job.recipe
    errors = measured.trial.errors
    inside = 0.0
    for name, shape in checked.selection.shapes.items():
        codec = measured.codecs.get(name, recipe.codec)
        inside += losses.of(name, _error(codec, errors.get(shape)))
    return kappa_of(recipe) * inside + sum(end_losses(job, checked, measured).values())


def end_losses(job: Job, checked: Checked, measured: Measured) -> dict[str, float]:
    """What the matrices outside the layers that the recipe quantizes are expected to add, by the
    module that stores them."""
    found = measured.found
    assert found is not None, "the model predicts tokens"
    matrices = outside.plan(checked.tensors.blueprint.model, job.recipe)
    return {
        matrix.names[0]: unit_loss(checked, matrix, found) * error_of(matrix.recipe.codec)
        for matrix in matrices
    }


def unit_loss(checked: Checked, matrix: Matrix, found: PassMeasured) -> float:
    """The loss for errors as large as the weights of a matrix outside the layers."""
    name = next(own for own in matrix.names if f"{own}.weight" in checked.tensors)
    W_RC = checked.tensors.read_rows(f"{name}.weight", 0, min(ROWS, matrix.spec.rows))
    mean = float(threads.mean(W_RC.float().square()))
    return found.ends.loss(matrix, mean)


def estimates(kl: float) -> tuple[Estimate, Estimate]:
    """The divergence and the ratio of perplexities, with their error.

    For text as the model writes it, the logarithm of the ratio is the divergence; on other text it
    is about that: 0.98 to 1.04 times for the `spread` recipes on WikiText-2.
    """
    low, high = kl / BAND, kl * BAND
    return Estimate(kl, low, high), Estimate(math.exp(kl), math.exp(low), math.exp(high))


def _error(codec: Codec, measured: float | None) -> float:
    return error_of(codec) if measured is None else measured
