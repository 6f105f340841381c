"""What is looked at before the long part of a run: the model, its linears, its values, the plan."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from vqllm.allocation.gradient_statistics import needs_gradients
from vqllm.calibration.gradients import WITHOUT
from vqllm.calibration.layers import check_states
from vqllm.checkpoint.file_names import FileNames
from vqllm.checkpoint.source import SourceTensors
from vqllm.checkpoint.stored import StoredFolder
from vqllm.checkpoint.writer import read_dense_config
from vqllm.core.coverage import HALF, kinds_of
from vqllm.errors import ModelError, NumericalError, RecipeError
from vqllm.hf import loading
from vqllm.hf.classes import predicts_tokens
from vqllm.hf.decoder_layers import layer_names
from vqllm.plan.costs import code_bits, options
from vqllm.plan.not_quantized import why_not_quantized
from vqllm.plan.other_lists import say_other_lists
from vqllm.plan.selection import Selection, select
from vqllm.quantization import embeddings as outside
from vqllm.recipes import Recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checked:
    """A model that a run will not fail on, as far as can be seen."""

    tensors: SourceTensors
    """its files; of its weights, none is read yet"""
    selection: Selection


def check_model(
    source: Path, name: str, recipe: Recipe, trust_remote_code: bool = False
) -> Checked:
    """Refuse a model that a run would fail on later. Takes less than a second and reads no weights.

    Args:
        source: its folder.
        name: what its user called it.

    Raises:
        ModelError: it is quantized already, a file is damaged, tensors are missing, the tokenizer
            cannot be loaded, there is nothing to quantize, linears are stored under other names, or
            the embedding or head cannot be stored as the recipe wants.
        RecipeError: the codes of no codec fit its budget of bits.
    """
    read_dense_config(source)
    stored = {name: tensor.shape for name, tensor in StoredFolder(source).tensors.items()}
    own = loading.skeleton(source, trust_remote_code=trust_remote_code)
    loading.check_tensors(source, own, stored)
    loading.load_tokenizer(source, trust_remote_code=trust_remote_code)
    return check_selection(SourceTensors.open(source, trust_remote_code), name, recipe)


def check_selection(tensors: SourceTensors, name: str, recipe: Recipe) -> Checked:
    """The part of `check_model` that looks at the model and no files, with its errors."""
    model = tensors.blueprint.model
    names = layer_names(model)
    say_other_lists(name, model, names)
    if not predicts_tokens(model.config):
        _check_without_predictions(name, model, recipe)
    conversions = tensors.blueprint.conversions
    selection = select(model, names, recipe, tensors.num_bytes, conversions.why_unnamed)
    shapes = selection.shapes
    if not shapes:
        reasons = why_not_quantized(model, names, (), recipe.skip, selection.kept)
        raise ModelError(
            f"{name} has nothing to quantize: {kinds_of(reasons)}. Quantized are the "
            "torch.nn.Linear modules of the decoder layers that no `skip` pattern of the recipe "
            "leaves out, without the kinds of its `skip_kinds`."
        )
    _check_budget(name, selection, recipe)
    check_states(model, names)
    _check_outside(tensors, model, recipe)
    FileNames(tensors.blueprint, shapes).check()
    return Checked(tensors, selection)


def _check_without_predictions(name: str, model: PreTrainedModel, recipe: Recipe) -> None:
    """Refuse a recipe that needs predictions of tokens for a model that has none."""
    needs = {
        "calibration.source: self": (
            "self" in recipe.calibration.source,
            "pass --calibration FILE",
        ),
        "gradients of the predictions": (needs_gradients(recipe), WITHOUT),
        "tune": (recipe.tune is not None, "--set tune=null"),
    }
    for key, (asked, instead) in needs.items():
        if asked:
            raise ModelError(
                f"{name} is a {type(model).__name__}, which predicts no tokens, but the recipe "
                f"{recipe.name} needs predictions ({key}). Without them: {instead}."
            )


def say_what_stays(name: str, checked: Checked, recipe: Recipe) -> None:
    """Say of which linears the packed tensors would not be smaller, and when most of a model is not
    quantized.

    Args:
        name: what the user called the model.
    """
    model, selection = checked.tensors.blueprint.model, checked.selection
    layers = layer_names(model)
    if selection.larger:
        first, reason = next(iter(selection.larger.items()))
        logger.warning(
            "%d linears of %s stay as they are, because packed they would not be smaller (`larger` "
            "in the recipe's skip_kinds). The first is %s%s; the report names all",
            *(len(selection.larger), name, first, reason[reason.index(" (") :]),
        )
    if selection.share < HALF:
        reasons = why_not_quantized(model, layers, selection.shapes, recipe.skip, selection.kept)
        inside = tuple(f"{layer}." for layer in layers)
        logger.warning(
            "only %.2f %% of the parameters in the decoder layers of %s will be quantized. What "
            "stays there: %s",
            *(100 * selection.share, name),
            kinds_of({own: reason for own, reason in reasons.items() if own.startswith(inside)}),
        )


def _check_budget(model: str, selection: Selection, recipe: Recipe) -> None:
    """Refuse a budget of bits that the codes of the cheapest codec alone exceed; say so of one
    that cannot be kept or spent."""
    if recipe.allocation is None:
        return
    bits = recipe.allocation.bits
    least_code = min(map(code_bits, recipe.codecs))
    if least_code > bits:
        raise RecipeError(
            f"allocation.bits is {bits:g}, but the cheapest of allocation.codecs takes "
            f"{least_code:g} bits a weight. Raise it, or add a codec of fewer bits."
        )
    costs = [
        options(shape, recipe, selection.limits[name]).values()
        for name, shape in selection.shapes.items()
    ]
    numel = sum(rows * cols for rows, cols in selection.shapes.values())
    least, most = (sum(map(of, costs)) / numel for of in (min, max))
    if least > bits:
        logger.warning(
            "allocation.bits is %g, but with scales, signs and tiles that do not divide them the "
            "linears of %s take at least %.4f bits a weight: every linear gets the cheapest codec",
            *(bits, model, least),
        )
    if most < bits:
        logger.warning(
            "allocation.bits is %g: %s takes no more than %.4f bits a weight with the codecs of "
            "this recipe, so every linear gets the largest",
            *(bits, model, most),
        )


def _check_outside(tensors: SourceTensors, model: PreTrainedModel, recipe: Recipe) -> None:
    """Refuse an embedding or a head that the recipe has and that cannot be stored so."""
    matrices = outside.plan(model, recipe)
    if not matrices:
        return
    for matrix in matrices:
        if not any(f"{name}.weight" in tensors for name in matrix.names):
            changes = " ".join(f"--set {key}=null" for key in matrix.keys)
            raise ModelError(
                f"{tensors.folder} stores no tensor {matrix.names[0]}.weight: its names differ "
                f"from the model's, so this matrix must stay as it is: {changes}."
            )
    outside.check_called(model, matrices)


def check_finite(module: nn.Module, where: str, besides: Iterable[nn.Module] = ()) -> None:
    """NumericalError if a loaded parameter is not finite; those `besides` are checked elsewhere."""
    others = {id(parameter) for other in besides for parameter in other.parameters()}
    for name, parameter in module.named_parameters():
        if parameter.is_meta or id(parameter) in others or not parameter.is_floating_point():
            continue
        bad = int((~torch.isfinite(parameter)).sum())
        if bad:
            raise NumericalError(
                f"{where}: {bad} of {parameter.numel()} values of {name} are NaN or infinite in "
                "the source model. Get an undamaged copy of it."
            )
