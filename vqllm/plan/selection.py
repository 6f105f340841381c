"""Which linears of a model are quantized."""

import re
from collections.abc import Collection, Mapping

from torch import nn

from vqllm.calibration.layer_stream import LayerStream, linears_of
from vqllm.recipes import Recipe

Shape = tuple[int, int]
"""Rows and columns."""


def chosen(linears: Mapping[str, nn.Linear], recipe: Recipe) -> dict[str, nn.Linear]:
    """The linears that no `skip` pattern of the recipe leaves out."""
    return {
        name: linear
        for name, linear in linears.items()
        if not any(re.search(pattern, name) for pattern in recipe.skip)
    }


def shapes_of(stream: LayerStream, recipe: Recipe) -> dict[str, Shape]:
    """Rows and columns of the linears of all layers that are to be quantized, by full name; their
    weights need not be loaded."""
    shapes: dict[str, Shape] = {}
    for layer in stream.names:
        shapes |= shapes_in(stream.model.get_submodule(layer), layer, stream.shared, recipe)
    return shapes


def shapes_in(
    layer: nn.Module, layer_name: str, shared: Collection[nn.Module], recipe: Recipe
) -> dict[str, Shape]:
    linears = chosen(linears_of(layer, layer_name, shared), recipe)
    return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
