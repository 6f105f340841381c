"""How every linear of a model will be stored, when it is known which codec each one gets."""

from collections.abc import Mapping

from vqllm.core.protocols import Codec
from vqllm.plan.cuts import divided
from vqllm.plan.packed_spec import stored_spec, with_scale
from vqllm.plan.selection import Selection
from vqllm.recipes import Recipe
from vqllm_kernels.linear import LinearSpec

SIDES = {"rows": "out", "columns": "in"}
"""What a stage of tuning trains, and the side on which it leaves stored scales."""


def planned_specs(
    selection: Selection, recipe: Recipe, codecs: Mapping[str, Codec]
) -> dict[str, LinearSpec]:
    """How each linear of the layers will be stored by a run, by full name.

    Args:
        codecs: of linears that have another than the recipe's.
    """
    specs = {}
    for name, (rows, cols) in selection.shapes.items():
        own = divided(recipe, selection.cuts.get(name)).with_codec(codecs.get(name, recipe.codec))
        specs[name] = stored_spec(rows, cols, own)
    return specs


def tuned_specs(specs: Mapping[str, LinearSpec], recipe: Recipe) -> dict[str, LinearSpec]:
    """The same when the stages of the recipe's `tune` are done: with the scales that they train."""
    kinds = {kind for stage in recipe.tune.stages for kind in stage.kinds} if recipe.tune else set()
    tuned = dict(specs)
    for kind, side in SIDES.items():
        if kind in kinds:
            tuned = {name: with_scale(spec, side)[0] for name, spec in tuned.items()}
    return tuned
