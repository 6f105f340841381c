"""Recipes: the shipped ones load, the rest is refused with the reason."""

from pathlib import Path

import pytest

from vqllm import recipe as recipes
from vqllm.errors import RecipeError
from vqllm.recipe import from_dict

MINIMAL = {"name": "x", "codec": {"type": "e8p"}, "rounding": {"type": "nearest"}}


@pytest.mark.parametrize("name", list(recipes.available()))
def test_shipped_recipe_loads_and_survives_yaml(name: str, tmp_path: Path) -> None:
    recipe = recipes.load(name)
    assert recipe.name == name
    assert recipe.description
    (tmp_path / "copy.yaml").write_text(recipe.to_yaml())
    assert recipes.load(tmp_path / "copy.yaml") == recipe


def test_best_recipes_are_shipped() -> None:
    assert set(recipes.BEST.values()) <= set(recipes.available())
    with pytest.raises(RecipeError, match="--bits 7: there is a best recipe for 2, 3, 4 bits"):
        recipes.best(7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codex": {}}, "codex: unknown key"),
        ({"codec": {"type": "e8q"}}, "unknown codec 'e8q'. Did you mean 'e8p'"),
        ({"codec": {}}, "a codec needs a `type`: one of"),
        ({"codec": {"type": "e8p", "colour": 3}}, "colour: unknown key"),
        ({"codec": {"type": "uniform", "bits": 9}}, "codec.*bits"),
        ({"rounding": {"type": "ldlq", "passes": -1}}, "passes"),
        ({"hessian": {"damping": 0}}, "hessian.damping"),
        ({"calibration": {"sequences": 0}}, "calibration.sequences"),
        ({"skip": ["("]}, "is no regular expression"),
        ({"transforms": [{"type": "hadamard", "side": "left"}]}, "transforms"),
        ({"codec": {"type": "residual", "stages": [{"type": "e8p"}]}}, "stages"),
        ({"version": 99}, "recipe version 99; this vqllm reads version 1"),
    ],
)
def test_wrong_recipes_are_refused_with_the_place(change: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        from_dict({**MINIMAL, **change}, "test")


def test_both_sides_are_two_transforms() -> None:
    recipe = from_dict({**MINIMAL, "transforms": [{"type": "hadamard", "side": "both"}]}, "test")
    assert [t.side for t in recipe.transforms] == ["in", "out"]


def test_changes_reach_any_key() -> None:
    changes = ("hessian.damping=0.5", "transforms.0.block=64", "calibration.source=[a, b]")
    recipe = recipes.load("e8p-2bit", changes)
    assert recipe.hessian.damping == 0.5
    assert recipe.to_dict()["transforms"][0]["block"] == 64
    assert recipe.calibration.source == ("a", "b")


@pytest.mark.parametrize("change", ["damping", "hessian.dumping=1", "transforms.9.block=1"])
def test_changes_that_lead_nowhere_are_refused(change: str) -> None:
    with pytest.raises(RecipeError):
        recipes.load("e8p-2bit", (change,))


def test_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        recipes.load("e8p-2bit").seed = 3


def test_file_that_is_not_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match="is not YAML"):
        recipes.load(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("values", "number"),
    [
        ({}, 64),
        ({"source": "text.txt"}, 128),
        ({"source": ["self", "text.txt"]}, 128),
        ({"sequences": 7}, 7),
    ],
)
def test_number_of_sequences_depends_on_the_source(values: dict, number: int) -> None:
    assert from_dict({**MINIMAL, "calibration": values}, "test").calibration.num_sequences == number
