"""A model before its weights are read: its modules in linear form, and where their tensors are."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vqllm.hf.conversions import Conversions
from vqllm.hf.linear_form import Part, to_linear_form
from vqllm.hf.loading import explained, skeleton
from vqllm.hf.released_formats import dequantizer


@dataclass(frozen=True)
class Blueprint:
    """A model on the meta device, all of whose known matrices are linears."""

    model: Any
    parts: Mapping[str, Part]
    """the parameters that transformers' own model has as parts of others, by full name"""
    shapes: Mapping[str, torch.Size]
    """of the tensors of transformers' own model, by full name"""
    conversions: Conversions
    """from the stored tensors to those of transformers' own model"""

    @classmethod
    def of(
        cls, folder: Path, stored: Iterable[str], trust_remote_code: bool = False, **options: Any
    ) -> "Blueprint":
        """Args:
            stored: names of the tensors in its files.
            options: more arguments for `skeleton`.

        Raises:
            ModelError: transformers cannot make the model.
        """
        model = skeleton(folder, trust_remote_code=trust_remote_code, **options)

        def make_whole() -> Any:
            return skeleton(folder, trust_remote_code=trust_remote_code, **options)

        with explained(folder):
            conversions = Conversions(model, stored, dequantizer(model.config), make_whole)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        return cls(model, to_linear_form(model), shapes, conversions)

    def origin(self, name: str) -> str:
        """The tensor of transformers' own model that a parameter is, or is a part of."""
        return self.parts[name].tensor if name in self.parts else name
