"""A budget of bits, and which codec each linear gets for it.

May import: core, recipes, calibration, plan, checkpoint, rounding.
Start at `choose_codecs.py`; `gradient_statistics.py` runs the pass with gradients that it needs.
"""

from vqllm.allocation.budget import Item, allocate
from vqllm.allocation.distortion import gaussian_mse

__all__ = ["Item", "allocate", "gaussian_mse"]
