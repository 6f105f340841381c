"""A budget of bits, and which codec each linear gets for it.

May import: core, recipes, calibration, plan, checkpoint, rounding.
Start at `run.py`; `budget.py` is the choice itself.
"""

from vqllm.allocation.budget import Item, allocate
from vqllm.allocation.distortion import gaussian_mse

__all__ = ["Item", "allocate", "gaussian_mse"]
