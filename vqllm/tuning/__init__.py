"""Steps after rounding, given H: they move codebooks and scales, codes, or both."""

from vqllm.tuning import codebook
from vqllm.tuning.base import TUNINGS

__all__ = ["TUNINGS", "codebook"]
