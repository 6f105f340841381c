"""What moves after rounding: codebooks and scales of one linear given H, and stages of
`vqllm tune` on whole models.

May import: core, hf.
Start at `base.py`, what a step and a stage are given.
"""

from vqllm.tuning import codebook, codebook_stage, end_to_end, layer, pv, straight_through
from vqllm.tuning.base import MODEL_TUNINGS, TUNINGS

__all__ = [
    "MODEL_TUNINGS",
    "TUNINGS",
    "codebook",
    "codebook_stage",
    "end_to_end",
    "layer",
    "pv",
    "straight_through",
]
