"""The size of the checkpoint, from how every linear will be stored, and what stays as it is."""

from collections.abc import Mapping
from dataclasses import dataclass

from vqllm.allocation.budget import allocate_or_least
from vqllm.allocation.choose_codecs import linear_items
from vqllm.checkpoint.planned_size import PlannedSize, planned_size
from vqllm.core.bits import BitCount, count
from vqllm.core.coverage import ParameterCounts
from vqllm.core.protocols import Codec
from vqllm.hf.decoder_layers import layer_names
from vqllm.plan.not_quantized import why_not_quantized
from vqllm.plan.selection import Selection
from vqllm.plan.specs import planned_specs, tuned_specs
from vqllm.quantization import embeddings as outside
from vqllm.quantization.checks import Checked
from vqllm.recipes import Recipe
from vqllm.report.summary import CODES, FILE, LINEARS


@dataclass(frozen=True)
class Sizes:
    """Of a checkpoint that is planned."""

    files: PlannedSize
    before: int
    """bytes of all tensors of the source model"""
    bits_per_weight: dict[str, float]
    parameters: ParameterCounts
    not_quantized: dict[str, str]


def sizes(checked: Checked, recipe: Recipe, codecs: Mapping[str, Codec]) -> Sizes:
    """The sizes that a run gives.

    Args:
        codecs: of linears that have another than the recipe's, by full name.
    """
    tensors, selection = checked.tensors, checked.selection
    model = tensors.blueprint.model
    layers = layer_names(model)
    inside = tuned_specs(planned_specs(selection, recipe, codecs), recipe)
    matrices = outside.plan(model, recipe)
    ends = tuned_specs({matrix.names[0]: matrix.spec for matrix in matrices}, recipe)
    tied = {name for matrix in matrices for name in matrix.tied}
    files = planned_size(tensors, layers, inside | ends, tied)
    bits = sum((count(spec.layout()) for spec in inside.values()), BitCount())
    numel, num_outside = (
        sum(spec.rows * spec.cols for spec in specs.values()) for specs in (inside, ends)
    )
    whole = sum(parameter.numel() for parameter in model.parameters())
    return Sizes(
        files=files,
        before=tensors.num_bytes(),
        bits_per_weight={
            CODES: bits.codes / numel,
            LINEARS: bits.total / numel,
            FILE: 8 * files.tensors / whole,
        },
        parameters=ParameterCounts(
            layers=selection.num_in_layers,
            layers_quantized=numel,
            model=whole,
            model_quantized=numel + num_outside,
        ),
        not_quantized=why_not_quantized(
            model, layers, {*inside, *ends, *tied}, recipe.skip, selection.kept
        ),
    )


def codecs_by_size(selection: Selection, recipe: Recipe) -> dict[str, Codec]:
    """A codec for every linear within the recipe's budget where nothing is known of what errors
    cost: all weights count alike. Their number of bits is that of a run up to a few linears."""
    if recipe.allocation is None:
        return {}
    numels = {name: rows * cols for name, (rows, cols) in selection.shapes.items()}
    items, numbers = linear_items(
        selection, recipe, lambda name, _, cost: numels[name] * 4.0 ** (-cost / numels[name])
    )
    picks = allocate_or_least(items, recipe.allocation.bits * sum(numels.values()))
    codecs = recipe.allocation.codecs
    return {name: codecs[own[pick]] for name, own, pick in zip(selection.shapes, numbers, picks)}
