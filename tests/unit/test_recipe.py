"""Recipes: the shipped ones load, the rest is refused with the reason."""

import math
from pathlib import Path
from typing import Any

import pytest

from vqllm import recipes
from vqllm.allocation.gradient_statistics import needs_gradients
from vqllm.core import resources
from vqllm.errors import RecipeError
from vqllm.plan.costs import code_bits
from vqllm.recipes import from_dict, tuning_from_dict
from vqllm.recipes.bases import merge
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


def test_shipped_recipes_lie_in_folders_and_have_names_of_their_own() -> None:
    files = {
        path
        for found in (recipes.available(), recipes.available_tuning())
        for path in found.values()
    }
    root = resources.recipes_dir()
    assert files == set(root.rglob("*.yaml"))
    folders = {path.parent for path in recipes.available().values()}
    assert folders == {root / name for name in ("defaults", "papers", "codecs")}
    assert {path.parent for path in recipes.available_tuning().values()} == {root / "tuning"}
    presets = [recipes.best(bits, preset) for bits in recipes.BITS for preset in recipes.PRESETS]
    assert {recipes.available()[name].parent.name for name in presets} == {"defaults"}


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
        ({"hessian": {"shrinkage": 1.1}}, r"hessian.shrinkage: .*equal to 1 .*\(it is 1\.1\)"),
        ({"hessian": {"shrinkage": -0.1}}, r"hessian.shrinkage: .*equal to 0 .*\(it is -0\.1\)"),
        ({"hessian": {"shrinkage": math.nan}}, "hessian.shrinkage: .*finite number"),
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


@pytest.mark.parametrize(
    ("base", "own", "merged"),
    [
        ({"a": 1, "b": 2}, {"b": 3, "c": 4}, {"a": 1, "b": 3, "c": 4}),
        ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"d": 3}}}, {"a": {"b": {"c": 1, "d": 3}}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": [{"b": 1}]}, {"a": [{"c": 2}]}, {"a": [{"c": 2}]}),
        ({"a": {"b": 1}}, {"a": None}, {"a": None}),
        ({"a": None}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": {"b": 1}}, {"a": 2}, {"a": 2}),
        ({"a": 2}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": {"b": 1}}, {"a": {}}, {"a": {"b": 1}}),
        ({"a": {"type": "x", "b": 1}}, {"a": {"c": 2}}, {"a": {"type": "x", "b": 1, "c": 2}}),
        (
            {"a": {"type": "x", "b": 1}},
            {"a": {"type": "x", "c": 2}},
            {"a": {"type": "x", "b": 1, "c": 2}},
        ),
        ({"a": {"type": "x", "b": 1}}, {"a": {"type": "y"}}, {"a": {"type": "y"}}),
        (
            {"a": {"type": "x", "first": {"type": "y", "b": 1}, "rest": {"type": "y", "b": 1}}},
            {"a": {"first": {"b": 2}, "rest": {"type": "z"}}},
            {"a": {"type": "x", "first": {"type": "y", "b": 2}, "rest": {"type": "z"}}},
        ),
    ],
)
def test_mappings_merge_and_the_rest_is_replaced(base: dict, own: dict, merged: dict) -> None:
    before = repr((base, own))
    assert merge(base, own) == merged
    assert repr((base, own)) == before


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return file


def test_a_file_over_a_shipped_recipe(tmp_path: Path) -> None:
    text = "name: mine\nbase: spread-2bit\ncodec: {state_bits: 10}\nallocation: null\n"
    found = recipes.load(write(tmp_path / "mine.yaml", text)).to_dict()
    expected = recipes.load("spread-2bit").to_dict()
    expected["codec"]["state_bits"] = 10
    assert found == {**expected, "name": "mine", "description": "", "allocation": None}
    assert "base" not in found


def test_codecs_to_allocate_change_the_merged_codec(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", "name: x\nbase: spread-3bit\ncodec: {code: mul1}\n")
    codecs = recipes.load(file).to_dict()["allocation"]["codecs"]
    assert {codec["code"] for codec in codecs} == {"mul1"}


def test_files_over_files_in_other_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "common.yaml", "calibration: {length: 64, sequences: 8}\nseed: 5\n")
    write(
        tmp_path / "a" / "first.yaml",
        "name: first\ndescription: of first\nbase: ../common.yaml\nseed: 6\n"
        "codec: {type: uniform, bits: 4, clip: mse}\nrounding: {type: ldlq}\n",
    )
    text = "base: ../a/first.yaml\nname: second\ncodec: {bits: 3}\ncalibration: {length: 32}\n"
    second = write(tmp_path / "b" / "second.yaml", text)
    monkeypatch.chdir(tmp_path / "a")
    for name in (second, "../b/second.yaml"):
        recipe = recipes.load(name)
        assert (recipe.name, recipe.description, recipe.seed) == ("second", "", 6)
        assert (recipe.calibration.length, recipe.calibration.sequences) == (32, 8)
        assert recipe.to_dict()["codec"]["bits"] == 3
        assert recipe.to_dict()["codec"]["clip"] == "mse"
    absolute = f"name: third\nbase: {second}\n"
    third = recipes.load(write(tmp_path / "third.yaml", absolute))
    assert third == recipes.load(second).model_copy(update={"name": "third"})


def test_a_shipped_name_comes_before_a_file(tmp_path: Path) -> None:
    # A user's own version of a shipped recipe, under the same name.
    file = write(tmp_path / "e8p-2bit.yaml", "name: e8p-2bit\nbase: e8p-2bit\nseed: 9\n")
    assert recipes.load(file).seed == 9
    write(tmp_path / "e8p-2bit", "seed: 7\n")
    assert recipes.load(file).codec == recipes.load("e8p-2bit").codec


def test_a_dictionary_over_a_shipped_recipe() -> None:
    values = {"name": "x", "base": "gptq-4bit", "codec": {"bits": 3}}
    recipe = from_dict(values, "test")
    assert recipe.to_dict()["codec"] == recipes.load("gptq-3bit").to_dict()["codec"]
    assert values == {"name": "x", "base": "gptq-4bit", "codec": {"bits": 3}}
    assert from_dict(recipe.to_dict(), "test") == recipe


def test_tuning_recipes_have_bases_too(tmp_path: Path) -> None:
    text = "name: x\nbase: end-to-end\ncalibration: {sequences: 7}\n"
    expected = recipes.load_tuning("end-to-end").to_dict()
    expected["calibration"]["sequences"] = 7
    found = recipes.load_tuning(write(tmp_path / "mine.yaml", text))
    assert found.to_dict() == {**expected, "name": "x", "description": ""}
    values = {"name": "x", "base": "end-to-end", "calibration": {"sequences": 7}}
    assert tuning_from_dict(values, "test") == found


def test_changes_come_after_the_merge(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", "name: x\nbase: spread-2bit\nhessian: {damping: 0.5}\n")
    changes = ("transforms.1.bits=3", "hessian.damping=0.25", "allocation.codecs.0.bits=1.5")
    recipe = recipes.load(file, changes)
    assert recipe.to_dict()["transforms"][1]["bits"] == 3
    assert (recipe.hessian.damping, recipe.hessian.power) == (0.25, 1)
    assert recipe.to_dict()["allocation"]["codecs"][0]["bits"] == 1.5
    assert recipes.load("spread-2bit").to_dict()["transforms"][1]["bits"] == 2
    with pytest.raises(RecipeError, match=r"--set 'base=e8p-2bit': a recipe is merged over its"):
        recipes.load(file, ("base=e8p-2bit",))
    # The option `base` of a codec is another one.
    assert recipes.load("quantease-3bit", ("codec.base.bits=4",)).to_dict()["codec"]["base"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            ["base: spread-2bot"],
            r"0\.yaml: base: unknown recipe 'spread-2bot'.*'spread-2bit'.*no /",
        ),
        (["base: none.yaml"], r"A path to a YAML file works too; there is no /.*none\.yaml"),
        (["base: 3"], r"expected the name of a shipped recipe, or a path .*\(it is 3\)"),
        (["base: null"], r"\(it is None\)"),
        (["base: [e8p-2bit]"], r"\(it is \['e8p-2bit'\]\)"),
        (["base: ."], "unknown recipe '.'"),
        (["base: 0.yaml"], r"base: 0\.yaml goes in a circle: \S*0\.yaml -> \S*0\.yaml\. Take"),
        (
            ["base: 1.yaml", "base: 2.yaml", "base: ./1.yaml"],
            r"2\.yaml: base: \./1\.yaml goes in a circle: \S*0\.yaml -> \S*1\.yaml -> "
            r"\S*2\.yaml -> \S*1\.yaml",
        ),
        (
            ["base: end-to-end"],
            "end-to-end is a recipe of vqllm tune, because it has stages; the base of",
        ),
        (
            ["base: 1.yaml", "teacher: live"],
            "1.yaml is a recipe of vqllm tune, because it has teacher",
        ),
        (
            ["base: 1.yaml", "base: 2.yaml", "shard: true"],
            r"1\.yaml: base: 2\.yaml is a recipe of vqllm tune",
        ),
        (["base: 1.yaml", "- 3"], r"1\.yaml holds list, expected a mapping"),
        (["base: 1.yaml", "version: 99"], r"1\.yaml has recipe version 99; this vqllm reads"),
        (["base: 1.yaml", "a: ["], r"1\.yaml is not YAML"),
        (["base: 1.yaml", "base: 2.yaml"], r"1\.yaml: base: unknown recipe '2\.yaml'"),
        (["base: e8p-2bit"], "name: missing"),
        (["{base: e8p-2bit, name: x, codec: {bits: 3}}"], "codec: bits: unknown key"),
    ],
)
def test_wrong_bases_are_refused(texts: list[str], message: str, tmp_path: Path) -> None:
    for i, text in enumerate(texts):
        write(tmp_path / f"{i}.yaml", text)
    with pytest.raises(RecipeError, match=message):
        recipes.load(tmp_path / "0.yaml")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("here.yaml", r"test: base: unknown recipe 'here\.yaml'.* In a dictionary `base` is a"),
        ("layer", "test: base: layer is a recipe of vqllm tune"),
        (None, "test: base: expected the name of a shipped recipe"),
    ],
)
def test_wrong_bases_of_dictionaries_are_refused(
    base: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "here.yaml", "seed: 1")
    with pytest.raises(RecipeError, match=message):
        from_dict({**MINIMAL, "base": base}, "test")


def test_a_quantize_recipe_is_no_base_of_a_tuning_recipe() -> None:
    message = "e8p-2bit is a recipe of vqllm quantize, because it has codec, rounding, transforms"
    with pytest.raises(RecipeError, match=message):
        tuning_from_dict({"name": "x", "base": "e8p-2bit"}, "test")
