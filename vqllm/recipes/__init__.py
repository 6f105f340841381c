"""What is to be done to a model: one frozen object, one YAML file.

May import: core, codecs, transforms, rounding, tuning.
Start at `schema.py`, the keys; those that hold settings of their own are in `sections.py` and
`vocabulary.py`. `loading.py` reads recipes, `bases.py` merges one over another, `presets.py`
chooses one by bits.
"""

from vqllm.recipes.loading import from_dict, load, load_tuning, tuning_from_dict
from vqllm.recipes.presets import BITS, LEAST, MOST, PRESETS, best, for_rate, spread
from vqllm.recipes.schema import Recipe, TuningRecipe, fields_of
from vqllm.recipes.sections import Calibration, SkippedKind, Stages
from vqllm.recipes.shipped import available, available_tuning
from vqllm.recipes.yaml_text import NOT_YAML, parse_yaml

__all__ = [
    "BITS",
    "LEAST",
    "MOST",
    "NOT_YAML",
    "PRESETS",
    "Calibration",
    "Recipe",
    "SkippedKind",
    "Stages",
    "TuningRecipe",
    "available",
    "available_tuning",
    "best",
    "fields_of",
    "for_rate",
    "from_dict",
    "load",
    "load_tuning",
    "parse_yaml",
    "spread",
    "tuning_from_dict",
]
