"""Which linears of a model are quantized."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from vqllm.calibration.layer_stream import linears_of
from vqllm.hf.linears import shared_modules
from vqllm.plan.kept import kept_linears
from vqllm.recipes import Recipe

Shape = tuple[int, int]
"""Rows and columns."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The linears of the decoder layers, divided. All names are full names."""

    shapes: Mapping[str, Shape]
    """rows and columns of those that are to be quantized, in the order of the layers"""
    kept: Mapping[str, str]
    """why others stay as they are, where it is not by name"""

    def of(self, linears: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
        """Those of these linears that are to be quantized."""
        return {name: linear for name, linear in linears.items() if name in self.shapes}


def select(model: nn.Module, layers: Collection[str], recipe: Recipe) -> Selection:
    """Divide the linears of a model's decoder layers.

    Args:
        model: the whole model; its tensors may be on the meta device.
        layers: full names of its decoder layers.
    """
    shapes: dict[str, Shape] = {}
    kept: dict[str, str] = {}
    shared = shared_modules(model, layers)
    for layer_name in layers:
        layer = model.get_submodule(layer_name)
        own = kept_linears(layer, recipe.skip_kinds)
        kept |= {f"{layer_name}.{name}": reason for name, reason in own.items()}
        for name, linear in linears_of(layer, layer_name, shared).items():
            if name not in kept and not any(re.search(pattern, name) for pattern in recipe.skip):
                shapes[name] = linear.out_features, linear.in_features
    return Selection(shapes=shapes, kept=kept)
