"""Damaged recipes: refused, or valid and written as they are read."""

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fuzz.damage import DEPTH, edit, flip, truncate, zero
from tests.fuzz.outcome import refused
from tests.support.params import slow_but
from vqllm import recipes

NAMES = sorted(recipes.available())


def damaged(seed: int, file: Path) -> None:
    """A recipe as people write it, with some of its keys, and a value changed or some bytes."""
    rng = random.Random(seed)
    values: Any = recipes.load(rng.choice(NAMES)).to_dict()
    for key in rng.sample(sorted(values), rng.randrange(6)):
        if key not in ("version", "name", "codec"):
            del values[key]
    try:
        for _ in range(rng.choice((1, 1, 2))):
            if isinstance(values, (dict, list)):
                values = edit(values, rng)
        file.write_text(yaml.safe_dump(values))
    except RecursionError:  # a deep value, which Python's own encoders refuse
        file.write_text("a: " + "[" * DEPTH + "]" * DEPTH)
    if rng.random() < 0.3:
        rng.choice((flip, zero, truncate))(file, rng)


@pytest.mark.parametrize("seed", slow_but(range(20), range(200)))
def test_recipe(seed: int, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    damaged(seed, file)
    _, recipe = refused(lambda: recipes.load(str(file)))
    if recipe is not None:
        assert recipes.from_dict(recipe.to_dict(), "again") == recipe
