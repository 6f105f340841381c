"""Recipes: the shipped ones load, the rest is refused with the reason."""

import math
from pathlib import Path

import pytest

from vqllm import recipes
from vqllm.allocation.run import needs_gradients
from vqllm.errors import RecipeError
from vqllm.plan.costs import code_bits
from vqllm.recipes import from_dict
from vqllm.runs.arguments import QuantizeArguments
from vqllm.runs.commands import recipe_of

MINIMAL = {"name": "x", "codec": {"type": "e8p"}, "rounding": {"type": "nearest"}}


@pytest.mark.parametrize("name", list(recipes.available()))
def test_shipped_recipe_loads_and_survives_yaml(name: str, tmp_path: Path) -> None:
    recipe = recipes.load(name)
    assert recipe.name == name
    assert recipe.description
    (tmp_path / "copy.yaml").write_text(recipe.to_yaml())
    assert recipes.load(tmp_path / "copy.yaml") == recipe


def test_best_recipes_are_shipped() -> None:
    for bits in (1.5, 2, 2.5, 3, 3.5, 4):
        names = [recipes.best(bits, preset) for preset in recipes.PRESETS]
        found = [recipes.load(name) for name in names]
        assert recipes.best(bits) == names[1]
        assert [recipe.codec.bits(256, 256).codes for recipe in found] == [bits * 256 * 256] * 4
        states = [recipe.to_dict()["codec"]["state_bits"] for recipe in found]
        assert states == [12, 12, 16, 12]
        assert [needs_gradients(recipe) for recipe in found] == [False, True, True, True]
        assert found[0].allocation is None
        assert [recipe.tune is not None for recipe in found] == [False, False, False, True]
        assert [recipe.layer is not None for recipe in found] == [False, False, False, True]
        for spread in found[1:]:
            assert spread.allocation is not None
            assert spread.allocation.bits == bits
            assert min(map(code_bits, spread.codecs)) < bits < max(map(code_bits, spread.codecs))
    with pytest.raises(RecipeError, match=r"--bits 7: there is a best recipe for 1\.5, 2, 2\.5, 3"):
        recipes.best(7)
    with pytest.raises(RecipeError, match=r"preset 'quick'.* Known: fast, balanced, best, tuned"):
        recipes.best(2, "quick")


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
        ({"codec": 5}, r"codec: .*\(it is 5\)"),
        ({"head": {}}, "head.codec: missing"),
        ({"embeddings": {"codec": {"type": "e8p"}, "rows": 3}}, "embeddings.rows: unknown key"),
        (
            {"head": {"codec": {"type": "e8p"}, "transforms": [{"type": "scale", "side": "both"}]}},
            "head: a transform with `side: out` .or both. mixes rows",
        ),
        (
            {"embeddings": {"codec": {"type": "e8p"}, "rounding": {"type": "ldlq"}}},
            "embeddings: rounding ldlq needs the Hessian of an input",
        ),
        ({"codec": {"type": ["e8p"]}}, "unknown codec"),
        ({"codec": {"type": "uniform", "bits": True}}, "codec: bits: true is neither a number"),
        (
            {"codec": {"type": "residual", "stages": [{"type": "e8p", "scale_factor": True}]}},
            "scale_factor: true is neither a number",
        ),
        ({"hessian": {"damping": math.nan}}, r"hessian.damping: .*finite number \(it is nan\)"),
        ({"hessian": {"damping": True}}, "hessian.damping: true is neither a number"),
        ({"calibration": {"sequences": True}}, "calibration.sequences: true is neither a number"),
        ({"calibration": {"source": []}}, "calibration.source: .*at least 1 item"),
        (
            {"tune": {"stages": [{"type": "layer"}], "calibration": {"source": "b.txt"}}},
            r"tune\.calibration\.source: b\.txt is another text than that of calibration\.source",
        ),
        ({"calibration": {"sequences": 10**12}}, "are 128000000000000 tokens; at most"),
        ({"calibration": {"sequences": 64, "length": 10**9}}, "are 64000000000 tokens; at most"),
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
    ("text", "message"),
    [
        ("seed: 1\nname: x\nseed: 2\n", "the key 'seed' comes a second time in line 3"),
        (
            "codec: {type: uniform, bits: 4, bits: 3}",
            "the key 'bits' comes a second time in line 1",
        ),
        ("name: 2026-13-01", "month must be"),
        ("[" * 5000, "is not YAML"),
    ],
)
def test_yaml_that_says_nothing_clear_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        recipes.load(tmp_path / "bad.yaml")


def test_a_change_with_a_key_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match="the key 'damping' comes a second time"):
        recipes.load("e8p-2bit", ("hessian={damping: 1, damping: 2}",))


def test_yaml_may_merge_and_override() -> None:
    text = "a: &a {type: hadamard, side: in}\nb: {<<: *a, side: out}"
    assert recipes.parse_yaml(text)["b"] == {"type": "hadamard", "side": "out"}


@pytest.mark.parametrize(
    ("values", "number"),
    [
        ({}, 256),
        ({"length": 512}, 64),
        ({"source": "text.txt"}, 512),
        ({"source": ["self", "text.txt"]}, 512),
        ({"source": "text.txt", "length": 10**6}, 1),
        ({"sequences": 7}, 7),
    ],
)
def test_number_of_sequences_depends_on_source_and_length(values: dict, number: int) -> None:
    assert from_dict({**MINIMAL, "calibration": values}, "test").calibration.num_sequences == number


@pytest.mark.parametrize(("source", "number"), [(None, 256), (["text.txt"], 512)])
def test_a_run_records_the_number_of_sequences(source: list[str] | None, number: int) -> None:
    recipe = from_dict(MINIMAL, "test")
    run = recipe_of(QuantizeArguments("model", "out", recipe, calibration=source))
    assert run.to_dict()["calibration"]["sequences"] == number
