"""What is looked at before the long part of a run: the model, its linears, its values, the plan."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from vqllm.calibration.layer_stream import check_states, layer_names
from vqllm.checkpoint.source import SourceTensors, stored_tensors
from vqllm.checkpoint.writer import read_dense_config
from vqllm.errors import ModelError, NumericalError, RecipeError
from vqllm.hf import loading
from vqllm.hf.linears import shared_modules
from vqllm.plan.costs import code_bits, option_costs
from vqllm.plan.not_quantized import nothing_to_quantize, why_not_quantized
from vqllm.plan.other_lists import say_other_lists
from vqllm.plan.selection import Shape, shapes_in
from vqllm.quantization import embeddings as outside
from vqllm.recipes import Recipe

logger = logging.getLogger(__name__)


def check_model(source: Path, name: str, recipe: Recipe, trust_remote_code: bool = False) -> None:
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
    model = loading.skeleton(source, trust_remote_code=trust_remote_code)
    stored = {name: tensor.shape for name, tensor in stored_tensors(source).items()}
    loading.check_tensors(source, model, stored)
    loading.load_tokenizer(source, trust_remote_code=trust_remote_code)
    names = layer_names(model)
    say_other_lists(name, model, names)
    shared = shared_modules(model, names)
    shapes: dict[str, Shape] = {}
    for layer in names:
        shapes |= shapes_in(model.get_submodule(layer), layer, shared, recipe)
    if not shapes:
        kinds = nothing_to_quantize(why_not_quantized(model, names, (), recipe.skip))
        raise ModelError(
            f"{name} has nothing to quantize: {kinds}. Quantized are the torch.nn.Linear "
            "modules of the decoder layers that no `skip` pattern of the recipe leaves out."
        )
    _check_names(source, model, shapes)
    _check_budget(name, shapes, recipe)
    check_states(model, names)
    _check_outside(source, model, recipe)


def _check_names(source: Path, model: PreTrainedModel, shapes: Mapping[str, Shape]) -> None:
    """Refuse linears that are stored under other names, which transformers renames when it loads:
    what is written has the names of the files."""
    tensors = SourceTensors(source, model)
    renamed = [name for name in shapes if f"{name}.weight" not in tensors]
    if renamed:
        raise ModelError(
            f"{source} stores no tensor {renamed[0]}.weight, and so with {len(renamed)} of "
            f"{len(shapes)} linears: its names differ from the model's. Leave them as they are by "
            "patterns for their names, --set skip=[PATTERN], or write the model with the names "
            "that it has in memory."
        )


def _check_budget(model: str, shapes: Mapping[str, Shape], recipe: Recipe) -> None:
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
    costs = [option_costs(shape, recipe) for shape in shapes.values()]
    numel = sum(rows * cols for rows, cols in shapes.values())
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


def _check_outside(source: Path, model: PreTrainedModel, recipe: Recipe) -> None:
    """Refuse an embedding or a head that the recipe has and that cannot be stored so."""
    matrices = outside.plan(model, recipe)
    if not matrices:
        return
    tensors = SourceTensors(source, model)
    for matrix in matrices:
        if not any(f"{name}.weight" in tensors for name in matrix.names):
            changes = " ".join(f"--set {key}=null" for key in matrix.keys)
            raise ModelError(
                f"{source} stores no tensor {matrix.names[0]}.weight: its names differ from the "
                f"model's, so this matrix must stay as it is: {changes}."
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
