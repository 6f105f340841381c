"""The parts of a comparison: its grid, its folder, the original's predictions, ranking, plot."""

import gc
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny import tiny_model
from vqllm import recipes
from vqllm.core import memory
from vqllm.core.pareto import pareto_front
from vqllm.distillation.cached_predictions import RecordedPredictions
from vqllm.errors import CheckpointError, RecipeError
from vqllm.evaluation import perplexity as evaluation
from vqllm.hf.decoder_layers import layer_names
from vqllm.hf.linears import is_linear
from vqllm.recipes import Recipe
from vqllm.report.comparison import comparison_notes, comparison_pages, comparison_rows
from vqllm.report.labels import overlap, place_labels
from vqllm.report.summary import LABELS
from vqllm.runs.compare.grid import expand, parse_grid
from vqllm.runs.compare.ranking import EQUAL_BITS, EQUAL_BYTES, RULE, size_classes, standings
from vqllm.runs.compare.result import ComparisonResult
from vqllm.runs.compare.store import Store


def build(origin: Any, changes: tuple[str, ...]) -> Recipe:
    return recipes.load(origin, changes)


def names(named: list[Any], **grid: list[Any]) -> list[str]:
    dotted = {key.replace("__", "."): values for key, values in grid.items()}
    return [member.name for member in expand(named, dotted, (), build)[0]]


def test_every_recipe_is_crossed_with_every_value() -> None:
    found = names(["e8p-2bit", "rtn-4bit"], hessian__damping=[0.01, 0.1], seed=[0, 1])
    assert found == [
        f"{recipe}_damping-{damping}_seed-{seed}"
        for recipe in ("e8p-2bit", "rtn-4bit")
        for damping in ("0.01", "0.1")
        for seed in (0, 1)
    ]
    members, _ = expand(["e8p-2bit"], {"hessian.damping": [1e-05]}, ("seed=3",), build)
    assert members[0].recipe.hessian.damping == 1e-05
    assert members[0].recipe.seed == 3
    assert members[0].changes == ("seed=3", "hessian.damping=1.0e-05")


def test_names_patterns_lists_and_files(tmp_path: Path) -> None:
    shipped = list(recipes.available())
    assert names(["gptq-*"]) == [name for name in shipped if name.startswith("gptq-")]
    assert names(["rtn-4bit, e8p-2bit", "e8p-?bit"]) == [
        "rtn-4bit",
        "e8p-2bit",
        "e8p-3bit",
        "e8p-4bit",
    ]
    folder = tmp_path / "a,b[1]"
    folder.mkdir()
    file = folder / "Mine v2.yaml"
    file.write_text(recipes.available()["e8p-2bit"].read_text())
    (name,) = names([file])
    assert re.fullmatch(r"mine-v2-[0-9a-f]{8}", name)
    # A list of many names is longer than any file's name may be.
    assert len(names([",".join([*shipped, *shipped])])) > 30
    with pytest.raises(RecipeError, match=r"no shipped recipe matches 'nothing-\*'"):
        names(["nothing-*"])
    with pytest.raises(RecipeError, match="nothing to compare"):
        names([])


def test_names_are_safe_unique_and_stable() -> None:
    values: list[Any] = [
        *(
            None,
            True,
            "true",
            2,
            "2",
            2.5,
            -1,
            "a/b",
            "a\\b",
            "..",
            "A",
            "a",
            "ä",
            "",
            " ",
            "\udcff",
        ),
        *([], [1, 2], {"type": "hadamard", "side": "in"}, {"type": "hadamard", "side": "out"}),
        "x" * 300,
    ]
    recipe = recipes.load("e8p-2bit")
    made: list[str] = []

    def differing(origin: Any, changes: tuple[str, ...]) -> Recipe:
        made.append(changes[-1])
        return recipe.model_copy(update={"seed": len(made)})

    found = [m.name for m in expand(["e8p-2bit"], {"some.key": values}, (), differing)[0]]
    assert len({name.casefold() for name in found}) == len(values)
    for name in found:
        assert re.fullmatch(r"e8p-2bit_key-[a-z0-9.-]*[a-z0-9]", name)
        assert len(name) < 80
    assert any(name.startswith("e8p-2bit_key-hadamard-") for name in found)
    again = expand(["e8p-2bit"], {"some.key": values[::-1]}, (), differing)[0]
    assert [m.name for m in again] == found[::-1]
    for change, value in zip(made, values):
        assert recipes.parse_yaml(change.partition("=")[2]) == value


def test_keys_with_one_ending_are_told_apart() -> None:
    grid = {"codec.bits": [2], "head.codec.bits": [3], "seed": [1]}
    recipe = recipes.load("e8p-2bit")
    (member,) = expand(["e8p-2bit"], grid, (), lambda *_: recipe)[0]
    assert member.name == "e8p-2bit_codec.bits-2_head.codec.bits-3_seed-1"


def test_a_repetition_is_named_and_left_out() -> None:
    grid = {"hessian.damping": [0.01, 0.02, 1e-2]}
    members, repeated = expand(["e8p-2bit", "e8p-2bit"], grid, (), build)
    assert [member.name for member in members] == ["e8p-2bit_damping-0.01", "e8p-2bit_damping-0.02"]
    assert repeated == {}
    members, repeated = expand(["rtn-4bit"], {"skip": [[], "[]"]}, (), build_skip)
    assert len(members) == 1
    assert list(repeated.values()) == ["rtn-4bit_skip-" + members[0].name.rpartition("-")[2]]
    assert list(repeated) != [members[0].name]


def build_skip(origin: Any, changes: tuple[str, ...]) -> Recipe:
    """A reader to which a text that holds a list is that list."""
    return recipes.load(origin, tuple(change.replace("'", "") for change in changes))


def test_two_recipes_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder, bits in (("a", 3), ("b", 4)):
        (tmp_path / folder).mkdir()
        text = recipes.available()["gptq-3bit"].read_text().replace("bits: 3", f"bits: {bits}")
        (tmp_path / folder / "mine.yaml").write_text(text)
    files = [tmp_path / folder / "mine.yaml" for folder in "ab"]
    with pytest.raises(RecipeError, match="two recipes would be called mine"):
        names(files)
    assert names([files[0], files[0]]) == ["mine"]


def test_all_combinations_that_are_no_recipe_are_named() -> None:
    with pytest.raises(RecipeError, match="2 of 4 members") as error:
        names(["gptq-3bit", "e8p-2bit"], codec__bits=[2, 3])
    assert "e8p-2bit_bits-2" in str(error.value)
    assert "e8p-2bit_bits-3" in str(error.value)
    assert "gptq" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("codec.bits=2,3", [2, 3]),
        ("skip=[],[lm_head, v_proj]", [[], ["lm_head", "v_proj"]]),
        ("rounding={type: ldlq, passes: 2},{type: nearest}", None),
        ("a='b,c',\"d\"", ["b,c", "d"]),
        ("a=null", [None]),
        ("a=b=c", ["b=c"]),
    ],
)
def test_values_are_the_inside_of_a_yaml_list(text: str, values: list[Any] | None) -> None:
    expected = values or [{"type": "ldlq", "passes": 2}, {"type": "nearest"}]
    assert parse_grid([text]) == {text.partition("=")[0]: expected}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["codec.bits"], "expected key=value"),
        (["=1"], "expected key=value"),
        (["a=[1"], "no inside of a YAML list"),
        (["a=2],[3"], "no inside of a YAML list"),
        (["a=1", "a=2"], "has a twice"),
    ],
)
def test_a_wrong_grid_says_what_is_expected(axes: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_grid(axes)


@pytest.mark.parametrize("values", [[], "23", [float("nan")], [object()]])
def test_values_that_no_recipe_can_hold_are_refused(values: Any) -> None:
    with pytest.raises(RecipeError, match=r"codec\.bits"):
        expand(["e8p-2bit"], {"codec.bits": values}, (), build)


def test_pareto_front_is_that_of_brute_force() -> None:
    rng = random.Random(0)
    for num in (0, 1, 2, 7, 40):
        for top in (3, 1000):  # few values make ties in one and in both
            points = [(rng.randrange(top), rng.randrange(top)) for _ in range(num)]
            expected = [
                not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
                for x, y in points
            ]
            costs, losses = [x for x, _ in points], [y for _, y in points]
            assert pareto_front(costs, losses) == expected


def test_a_class_has_no_sizes_that_differ_by_more() -> None:
    rng = random.Random(1)
    sizes = [rng.uniform(1.5, 4.5) for _ in range(60)]
    classes = size_classes(sizes, absolute=EQUAL_BITS)
    for number in set(classes):
        own = [size for size, other in zip(sizes, classes) if other == number]
        assert max(own) - min(own) <= EQUAL_BITS
        # The next larger size would be too far from the smallest of the class.
        assert all(s > min(own) + EQUAL_BITS for s in sizes if s > max(own))
    assert size_classes([100, 105, 105.1, 90], relative=EQUAL_BYTES) == [1, 1, 2, 0]


def test_ranks_are_by_kl_among_members_of_equal_size() -> None:
    rng = random.Random(2)
    bits = [rng.choice([2.0, 2.05, 2.5, 3.0]) for _ in range(50)]
    num_bytes = [rng.choice([1000, 1040, 1200]) for _ in range(50)]
    kl = [rng.choice([0.1, 0.2, 0.3, 0.4]) for _ in range(50)]
    found = standings(bits, num_bytes, kl)

    def equal(i: int, j: int) -> bool:
        same_bits = bits[i] == bits[j] or {bits[i], bits[j]} == {2.0, 2.05}
        return same_bits and (num_bytes[i] == 1200) == (num_bytes[j] == 1200)

    for i, standing in enumerate(found):
        rivals = [j for j in range(50) if equal(i, j)]
        assert standing.num_ranked == len(rivals)
        assert standing.rank == 1 + sum(kl[j] < kl[i] for j in rivals)
        assert {found[j].size_class for j in rivals} == {standing.size_class}
        assert standing.front_bits == pareto_front(bits, kl)[i]
        assert standing.front_file == pareto_front(num_bytes, kl)[i]


def result(bits: float, kl: float, **changes: Any) -> dict[str, Any]:
    """What a finished member leaves."""
    measured = {
        **{"text": "a text", "num_windows": 2, "window_length": 64, "perplexity": 20 + 10 * kl},
        **{"baseline_perplexity": 20.0, "kl": kl, "top1": 0.5},
    }
    return {
        "recipe": {"name": "x"},
        "bits_per_weight": dict(zip(sorted(LABELS), (bits, bits - 0.1, bits + 1))),
        "bytes": round(1e7 * bits),
        "source_bytes": 10**8,
        "evaluation": measured,
        "cost": {"seconds": {"quantization": 3.0}, "whole": True, "peak_memory_bytes": 10**9},
        **changes,
    }


def compared(num: int = 4, **others: Any) -> dict[str, Any]:
    rng = random.Random(num)
    results = {
        f"recipe-{i}": result(rng.choice([2.0, 3.0]), rng.uniform(0.05, 1)) for i in range(num)
    }
    return ComparisonResult.of("a model", results, **others).to_dict()


def test_the_table_has_everybody_and_says_how_it_ranks() -> None:
    stopped = {"seconds": {"quantization": 3.0}, "whole": False, "peak_memory_bytes": None}
    found = ComparisonResult.of(
        "a model",
        {"worse": result(2.0, 0.5), "large": result(3.0, 0.1), "better": result(2.01, 0.4)}
        | {"stopped": result(3.5, 0.05, cost=stopped)},
        failed={"broken": "NumericalError: layer 3"},
        repeated={"twin": "better"},
        waiting=["later"],
    )
    assert [row["name"] for row in found.rows] == ["better", "worse", "large", "stopped"]
    assert [row["standing"]["rank"] for row in found.rows] == [1, 2, 1, 1]
    assert found.original == {"bytes": 10**8, "perplexity": 20.0}
    rows = {row[0]: row for row in comparison_rows(found.to_dict())}
    assert list(rows) == ["better", "worse", "large", "stopped", "original", "broken", "later"]
    assert rows["better"][1:] == (
        *("1.91 / 2.01 / 3.01", "20.1", "24.00", "1.200", "0.4000", "50.0 %", "3", "1000 MB"),
        *("1 of 2", "bits, file"),
    )
    assert rows["stopped"][7:9] == ("≥ 3", "")
    assert {len(row) for row in rows.values()} == {11}
    notes = "\n".join(comparison_notes(found.to_dict()))
    for text in (RULE, "a text", "twin is better", "broken failed: NumericalError: layer 3", "≥"):
        assert text in notes


@pytest.mark.parametrize("num", [0, 1, 20])
def test_pages_of_any_number_of_members(num: int) -> None:
    found = compared(num)
    pages = comparison_pages(found, "vqllm compare")
    if num == 1:
        assert pages == comparison_pages(found, "vqllm compare")
    assert pages["comparison.png"].startswith(b"\x89PNG")
    assert json.loads(pages["comparison.json"]) == found
    assert pages["comparison.md"].decode().count("/report.md)") == num


def test_an_endless_perplexity_is_no_obstacle_to_the_plot() -> None:
    results = {"good": result(2.0, 0.5), "broken": result(2.0, 9.0)}
    results["broken"]["evaluation"]["perplexity"] = math.inf
    found = ComparisonResult.of("a model", results).to_dict()
    assert comparison_pages(found, "")["comparison.png"].startswith(b"\x89PNG")


def test_labels_hide_nothing_where_there_is_room() -> None:
    rng = random.Random(3)
    frame = (0.0, 0.0, 400.0, 300.0)
    column = [(100.0 + rng.uniform(-1, 1), 120 + 6.0 * i) for i in range(12)]
    spread = [(rng.uniform(30, 280), rng.uniform(30, 270)) for _ in range(12)]
    for points in (column, spread, [(50.0, 50.0)] * 3):
        sizes = [(rng.uniform(50, 90), 9.0) for _ in points]
        boxes = [place.box for place in place_labels(points, sizes, frame)]
        for i, box in enumerate(boxes):
            assert all(overlap(box, other) == 0 for other in boxes[:i])
            assert all(low <= value for low, value in zip(frame[:2], box[:2]))
            assert all(value <= high for high, value in zip(frame[2:], box[2:]))
            assert (box[2] - box[0], box[3] - box[1]) == pytest.approx(sizes[i])
            for x, y in points:
                assert not (box[0] < x < box[2] and box[1] < y < box[3])


def test_a_folder_is_for_one_comparison(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with Store(folder, {"text": "a", "windows": 2}) as store:
        store.save_result("one", {"kl": 0.5})
        with pytest.raises(CheckpointError, match="another process is comparing"):
            Store(folder, {"text": "a", "windows": 2})
    with Store(folder, {"windows": 2, "text": "a"}) as store:
        assert store.result("one") == {"kl": 0.5}
        assert store.result("two") is None
    with pytest.raises(CheckpointError, match=r"windows: 2 → 3") as error:
        Store(folder, {"text": "a", "windows": 3})
    assert "text" not in str(error.value).split("\n")[1]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("do not touch")
    with pytest.raises(CheckpointError, match=r"thesis\.txt"):
        Store(tmp_path / "other", {})
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_damage_is_named_or_mended(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        return {"calibration": torch.arange(6).view(2, 3)}

    with Store(tmp_path / "out", {}) as store:
        for seed in (0, 0, 1):
            tokens = store.sequences({"seed": seed}, make)["calibration"]
            assert torch.equal(tokens, torch.arange(6).view(2, 3))
        assert len(made) == 2
        for path in store.staging.glob("sequences-*"):
            path.write_bytes(path.read_bytes()[:-5])
        assert store.sequences({"seed": 0}, make)["calibration"].shape == (2, 3)
        assert len(made) == 3
        store.save_result("one", {})
        (store.staging / "results" / "one.json").write_text('{"kl": ')
        with pytest.raises(CheckpointError, match=r"one\.json is damaged.*Delete it and"):
            store.result("one")


@pytest.mark.parametrize("arch", ["llama", "gemma2", "opt", "gpt_neox"])
def test_the_original_is_run_once_and_its_logits_stay_the_same(arch: str, tmp_path: Path) -> None:
    overrides = {"final_logit_softcapping": 2.0} if arch == "gemma2" else {}
    original = tiny_model(arch, **overrides).to(torch.bfloat16)
    member = tiny_model(arch, seed=1, **overrides).to(torch.bfloat16)
    tokens = torch.randint(3, 384, (3, 40), generator=torch.Generator().manual_seed(0))
    num_layers: list[int] = []
    names = layer_names(original)
    linear = next(m for m in original.get_submodule(names[0]).modules() if is_linear(m))
    linear.register_forward_pre_hook(lambda _, given: num_layers.append(1))
    expected = evaluation.compare(member, original, tokens)

    def cached() -> RecordedPredictions:
        return RecordedPredictions(original, tokens, tmp_path)

    for num_runs in (len(tokens), 0):
        num_layers.clear()
        assert evaluation.compare(member, cached(), tokens) == expected
        assert len(num_layers) == num_runs
    assert not any(original.get_submodule(name)._forward_hooks for name in names)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-5])
    assert evaluation.compare(member, cached(), tokens) == expected
    # Other windows are run.
    assert evaluation.compare(member, cached(), tokens[:, ::2]).kl >= 0


def test_equal_windows_are_stored_too(tmp_path: Path) -> None:
    model, tokens = tiny_model(), torch.arange(3, 43).expand(2, 40)
    for _ in range(2):
        cached = RecordedPredictions(model, tokens, tmp_path)
        assert evaluation.compare(model, cached, tokens).kl == 0
    assert not cached._missing


def test_logits_that_do_not_follow_from_the_last_layer_are_computed_every_time(
    tmp_path: Path,
) -> None:
    class Mixed(torch.nn.Module):
        """Its logits depend on what its first layer gives, too."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model, self.config, self.device = model, model.config, model.device
            self.dtype = model.dtype
            first = model.get_submodule(layer_names(model)[0])
            linear = next(module for module in first.modules() if is_linear(module))
            self.sums: list[torch.Tensor] = []
            linear.register_forward_hook(lambda *seen: self.sums.append(seen[-1].sum()))

        def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
            output = self.model(input_ids=input_ids, **options)
            output.logits = output.logits + sum(self.sums)
            self.sums.clear()
            return output

    mixed = Mixed(tiny_model())
    tokens = torch.arange(3, 43)[None]
    with torch.inference_mode():
        expected = mixed(tokens, use_cache=False).logits
        cached = RecordedPredictions(mixed, tokens, tmp_path / "cached")
        for _ in range(2):
            assert torch.equal(cached(tokens, use_cache=False).logits, expected)
    assert not (tmp_path / "cached").exists()


def test_the_peak_of_memory_can_be_counted_from_here_on() -> None:
    gc.collect()  # models of other tests have cycles; freed below, they would hide what is counted
    large = torch.ones(256 << 20, dtype=torch.uint8)  # much beside what a system takes back
    before = memory.peak_resident()
    del large
    if not memory.restart_peak():
        pytest.skip("this system counts from the start of the process")
    after = memory.peak_resident()
    assert after < before - (128 << 20)
    large = torch.ones(256 << 20, dtype=torch.uint8)
    assert memory.peak_resident() > after + (128 << 20)
    assert large[0] == 1
