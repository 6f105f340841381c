"""Checkpoints of other tools: dense weights, or our packed tensors, from what is stored.

May import: core.
Start at `base.py`, what a format is; `registry.py` finds it by the `quant_method` of config.json,
`coded_model.py` knows what all tensors of a folder mean. One file a format.
"""

from vqllm.foreign.registry import METHODS, format_of, without_codes

__all__ = ["METHODS", "format_of", "without_codes"]
