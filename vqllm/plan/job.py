"""What a run is to do, to which model, where."""

from dataclasses import dataclass
from pathlib import Path

import torch

from vqllm.calibration.layer_stream import LayerStream
from vqllm.checkpoint.source import SourceTensors
from vqllm.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to do, to which model, where."""

    source: Path
    """an ordinary Hugging Face folder"""
    model: str
    """the model as its user named it"""
    origin: str
    """what the checkpoint says it was made from"""
    recipe: Recipe
    output: Path
    device: torch.device
    compute_dtype: torch.dtype | None = None
    """dtype in which layers run; None chooses by source dtype and device"""
    trust_remote_code: bool = False
    is_part: bool = False
    """whether the checkpoint is a part of another run, and nothing that somebody publishes"""
    activation_budget: int = 4 << 30
    """bytes of activations in memory; beyond, hidden states are in a file in the output folder"""

    def open_stream(self, tensors: SourceTensors | None = None) -> LayerStream:
        """The unquantized model, layer by layer.

        Args:
            tensors: of the source, opened before, in which no other stream is.
        """
        return LayerStream(
            self.source, self.device, self.compute_dtype, self.trust_remote_code, tensors
        )
