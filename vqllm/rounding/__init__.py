"""Rules that choose codes, given H.

May import: core.
Start at `ldlq.py`, which is GPTQ too.
"""

from vqllm.rounding import beam, coordinate_rule, ldlq, nearest, two_sided
from vqllm.rounding.base import ROUNDINGS

__all__ = ["ROUNDINGS", "beam", "coordinate_rule", "ldlq", "nearest", "two_sided"]
