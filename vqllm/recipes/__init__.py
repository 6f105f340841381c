"""What is to be done to a model: one frozen object, one YAML file.

May import: core, codecs, transforms, rounding, tuning.
Start at `schema.py`, the keys; `loading.py` reads files, `presets.py` chooses by bits.
"""

from vqllm.recipes.loading import (
    NOT_YAML,
    from_dict,
    load,
    load_tuning,
    parse_yaml,
    tuning_from_dict,
)
from vqllm.recipes.presets import BITS, PRESETS, best
from vqllm.recipes.schema import Calibration, Recipe, Stages, TuningRecipe, fields_of
from vqllm.recipes.shipped import available, available_tuning

__all__ = [
    "BITS",
    "NOT_YAML",
    "PRESETS",
    "Calibration",
    "Recipe",
    "Stages",
    "TuningRecipe",
    "available",
    "available_tuning",
    "best",
    "fields_of",
    "from_dict",
    "load",
    "load_tuning",
    "parse_yaml",
    "tuning_from_dict",
]
