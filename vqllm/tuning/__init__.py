"""What moves after rounding: codebooks and scales of a linear given H, and whole models."""

from vqllm.tuning import codebook, end_to_end, layer, pv, refit, straight_through
from vqllm.tuning.base import MODEL_TUNINGS, TUNINGS

__all__ = [
    "MODEL_TUNINGS",
    "TUNINGS",
    "codebook",
    "end_to_end",
    "layer",
    "pv",
    "refit",
    "straight_through",
]
