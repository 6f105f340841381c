"""What is looked at before the long part of a run: the model, its linears, its values, the plan."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from vqllm import loading, outside
from vqllm.calibration.stream import LayerStream, check_states, layer_names, linears_of
from vqllm.checkpoint.source import SourceTensors, stored_tensors
from vqllm.checkpoint.writer import read_dense_config
from vqllm.errors import ModelError, NumericalError
from vqllm.group import linear_spec
from vqllm.linears import shared_modules
from vqllm.recipe import Recipe
from vqllm.survey import nothing_to_quantize, why_not_quantized
from vqllm_kernels.linear import LinearSpec


def check_model(source: Path, name: str, recipe: Recipe, trust_remote_code: bool = False) -> None:
    """Refuse a model that a run would fail on later. Takes less than a second and reads no weights.

    Args:
        source: its folder.
        name: what its user called it.

    Raises:
        ModelError: it is quantized already, a file is damaged, tensors are missing, the tokenizer
            cannot be loaded, there is nothing to quantize, or the embedding or head cannot be
            stored as the recipe wants.
    """
    read_dense_config(source)
    model = loading.skeleton(source, trust_remote_code=trust_remote_code)
    shapes = {name: tensor.shape for name, tensor in stored_tensors(source).items()}
    loading.check_tensors(source, model, shapes)
    loading.load_tokenizer(source, trust_remote_code=trust_remote_code)
    names = layer_names(model)
    shared = shared_modules(model, names)
    linears = [linears_of(model.get_submodule(layer), layer, shared) for layer in names]
    if not any(chosen(found, recipe) for found in linears):
        kinds = nothing_to_quantize(why_not_quantized(model, names, (), recipe.skip))
        raise ModelError(
            f"{name} has nothing to quantize: {kinds}. Quantized are the torch.nn.Linear "
            "modules of the decoder layers that no `skip` pattern of the recipe leaves out."
        )
    check_states(model, names)
    _check_outside(source, model, recipe)


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


def chosen(linears: Mapping[str, nn.Linear], recipe: Recipe) -> dict[str, nn.Linear]:
    """The linears that no `skip` pattern of the recipe leaves out."""
    return {
        name: linear
        for name, linear in linears.items()
        if not any(re.search(pattern, name) for pattern in recipe.skip)
    }


def planned(stream: LayerStream, recipe: Recipe) -> dict[str, LinearSpec]:
    """How the linears of all layers will be stored; their weights need not be loaded."""
    return {
        name: linear_spec(linear.out_features, linear.in_features, recipe)
        for layer_name in stream.names
        for name, linear in chosen(
            linears_of(stream.model.get_submodule(layer_name), layer_name, stream.shared), recipe
        ).items()
    }


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
