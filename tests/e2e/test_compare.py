"""Whole comparisons on a tiny model: what they leave, and what happens when they are stopped."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import vqllm
from tests.support.params import slow_but
from tests.support.tiny import TEXT, save_tiny
from vqllm import api, cli, recipes
from vqllm.checkpoint.resume.layer_writer import LayerWriter
from vqllm.checkpoint.resume.tuned_writer import TunedWriter
from vqllm.errors import CheckpointError, EvaluationError, ModelError, OutOfSpaceError
from vqllm.recipes import Recipe
from vqllm.runs import quantize as quantization
from vqllm.runs.compare.result import ComparisonResult

RECIPES = ["rtn-4bit", "e8p-2bit"]
SMALL = ("calibration.sequences=4", "calibration.length=32")

MEASURED = "vqllm.evaluation.perplexity.compare"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of one layer, `model`, and a text, `text.txt`."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "model", num_hidden_layers=1)
    (folder / "text.txt").write_text(TEXT * 40)
    return folder


def options(place: Path, **changes: Any) -> dict[str, Any]:
    text = place / "text.txt"
    values = {"calibration": text, "changes": SMALL, "eval_text": text, "eval_windows": 2}
    return values | changes


def compare(place: Path, output: Path, **changes: Any) -> ComparisonResult:
    recipe = changes.pop("recipe", RECIPES)
    return api.compare(place / "model", output, recipe, **options(place, **changes))


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A comparison that nobody stopped."""
    assert not compare(place, place / "whole").failed
    return place / "whole"


@pytest.fixture
def undrawn(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons draw no plot, which takes longer than a member of this size."""
    monkeypatch.setattr("vqllm.report.comparison.plot_comparison", lambda _: b"\x89PNG")


def lasting(folder: Path) -> Any:
    """What a comparison wrote, without what its members cost."""
    found = json.loads((folder / "comparison.json").read_text())
    for row in found["rows"]:
        del row["cost"]
    return found


def same_members(a: Path, b: Path) -> bool:
    files = {path.relative_to(a) for name in RECIPES for path in (a / name).glob("*.safetensors")}
    assert len(files) == 2 * len(RECIPES)
    return all((a / file).read_bytes() == (b / file).read_bytes() for file in files)


def test_members_are_what_quantize_makes(
    place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = place / "alone"
    alone = api.quantize(place / "model", output, recipe="e8p-2bit", **options(place))
    row = next(row for row in lasting(whole)["rows"] if row["name"] == "e8p-2bit")
    assert row["evaluation"] == alone.evaluation
    assert row["bits_per_weight"] == alone.bits_per_weight
    assert row["bytes"] == alone.bytes_after
    assert alone.evaluation is not None
    assert row["ratio"] == alone.evaluation["perplexity"] / alone.evaluation["baseline_perplexity"]
    assert row["recipe"]["calibration"]["sequences"] == 4
    for path in output.glob("*.safetensors"):
        assert (whole / "e8p-2bit" / path.name).read_bytes() == path.read_bytes()
    assert not (whole / "e8p-2bit" / ".vqllm").exists()
    card = (whole / "e8p-2bit" / "README.md").read_text()
    assert f"{alone.evaluation['kl']:.4f}" in card
    call = next(line.strip() for line in card.splitlines() if "vqllm.quantize(" in line)
    monkeypatch.chdir(place)  # it has names, and no places
    eval(call.replace("'e8p-2bit'", "'again'", 1))
    for path in output.glob("*.safetensors"):
        assert (place / "again" / path.name).read_bytes() == path.read_bytes()


def test_what_a_comparison_leaves(place: Path, whole: Path) -> None:
    found = json.loads((whole / "comparison.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["e8p-2bit", "rtn-4bit"]
    assert found["waiting"] == []
    assert found["text"].startswith("text.txt, 2 windows of 256 tokens")
    assert found["original"]["bytes"] > max(row["bytes"] for row in found["rows"])
    for row in found["rows"]:
        assert set(row["cost"]["seconds"]) == {"calibration text", "quantization", "evaluation"}
        assert row["cost"]["whole"] is True
        assert row["standing"]["rank"] == 1
        assert row["evaluation"]["kl"] > 0
    assert (whole / "comparison.png").read_bytes().startswith(b"\x89PNG")
    page = (whole / "comparison.md").read_text()
    assert "[e8p-2bit](e8p-2bit/report.md)" in page
    assert f"vqllm.compare('model', '{whole.name}', ['rtn-4bit', 'e8p-2bit']," in page


def test_nothing_finished_is_repeated_and_recipes_can_be_added(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = shutil.copytree(whole, tmp_path / "out")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with monkeypatch.context() as patched:
        patched.setattr(quantization, "run", lambda *_, **__: pytest.fail("a member was run"))
        compare(place, output, command=None)
    page = output / "comparison.md"
    for path, contents in before.items():
        if path != page:  # which has the command, and in it another folder
            assert path.read_bytes() == contents
    ran: list[str] = []
    run = quantization.run

    def watched(job: Any, *rest: Any, **named: Any) -> Any:
        ran.append(job.output.name)
        return run(job, *rest, **named)

    monkeypatch.setattr(quantization, "run", watched)
    found = compare(place, output, recipe=[*RECIPES, "gptq-4bit"])
    assert ran == ["gptq-4bit"]
    assert {row["name"] for row in found.rows} == {*RECIPES, "gptq-4bit"}
    rtn, gptq = (next(r for r in found.rows if r["name"] == n) for n in ("rtn-4bit", "gptq-4bit"))
    assert rtn["standing"]["num_ranked"] == gptq["standing"]["num_ranked"] == 2
    assert (rtn["standing"]["rank"] < gptq["standing"]["rank"]) == (
        rtn["evaluation"]["kl"] < gptq["evaluation"]["kl"]
    )


class Killed(BaseException):
    """As Ctrl-C: nothing in the package stops it."""


class KillAt:
    """Stops a comparison at its n-th event."""

    def __init__(self, event: int) -> None:
        self.left = event

    def _event(self, *args: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed

    phase = share = layers = linear = layer = _event


# A member has 13 events: its name, the text, the layers, 7 linears, the layer, two last phases.
@pytest.mark.parametrize("event", slow_but([21], [2, 8, 13, 21]))
def test_a_stopped_comparison_goes_on_to_the_same_result(
    event: int, place: Path, whole: Path, undrawn: None, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        compare(place, tmp_path / "out", progress=KillAt(event))
    compare(place, tmp_path / "out")
    assert lasting(tmp_path / "out") == lasting(whole)
    assert same_members(whole, tmp_path / "out")


def test_a_member_stopped_after_its_measurement_is_closed_and_not_measured_again(
    place: Path, whole: Path, undrawn: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(LayerWriter, "complete", killed)
        with pytest.raises(Killed):
            compare(place, tmp_path / "out", recipe="e8p-2bit")
    kept = tmp_path / "out" / ".vqllm" / "results" / "e8p-2bit.json"
    before = kept.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(MEASURED, lambda *_: pytest.fail("measured again"))
        found = compare(place, tmp_path / "out", recipe="e8p-2bit")
    assert kept.read_bytes() == before
    assert [row["name"] for row in found.rows] == ["e8p-2bit"]
    assert not (tmp_path / "out" / "e8p-2bit" / ".vqllm").exists()
    expected = (whole / "e8p-2bit" / "report.md").read_text().replace(str(whole), "")
    assert (tmp_path / "out" / "e8p-2bit" / "report.md").read_text().replace(
        str(tmp_path / "out"), ""
    ) == expected


def test_one_that_fails_is_named_and_keeps_nobody_from_running(place: Path, tmp_path: Path) -> None:
    grid = {"calibration.sequences": [100_000, 4]}
    found = compare(place, tmp_path / "out", recipe=["rtn-4bit"], grid=grid)
    assert [row["name"] for row in found.rows] == ["rtn-4bit_sequences-4"]
    assert list(found.failed) == ["rtn-4bit_sequences-100000"]
    assert "CalibrationError" in found.failed["rtn-4bit_sequences-100000"]
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "| rtn-4bit_sequences-100000 | failed |" in page
    assert "rtn-4bit_sequences-100000 failed: CalibrationError" in page
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert str(place) not in json.dumps(written)
    assert written["model"] == "model"
    assert written["failed"].keys() == found.failed.keys()
    assert [row["name"] for row in written["rows"]] == [row["name"] for row in found.rows]


def test_a_full_disk_stops_the_comparison(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OutOfSpaceError("no space left")

    monkeypatch.setattr(quantization, "run", full)
    with pytest.raises(OutOfSpaceError):
        compare(place, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_windows": 1}, r"2 windows of 256 tokens\" → \"text.txt, 1 windows"),
        ({"compute_dtype": "float32"}, r"compute_dtype: \"auto\" → \"torch.float32\""),
        ({"eval_text": None, "eval_windows": None}, r"evaluation\.held_out_of"),
    ],
)
def test_what_makes_members_incomparable_is_refused(
    changes: dict[str, Any], message: str, place: Path, whole: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        compare(place, whole, **changes)


def test_another_recipe_of_the_same_name_is_refused(
    place: Path, whole: Path, undrawn: None, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"hessian\.damping: 0\.01 → 0\.5"):
        compare(place, whole, changes=(*SMALL, "hessian.damping=0.5"))
    with pytest.raises(Killed):
        compare(place, tmp_path / "out", progress=KillAt(8))
    # Found before the member before it is run.
    with pytest.raises(CheckpointError, match=r"seed: 0 → 1"):
        compare(place, tmp_path / "out", recipe=RECIPES[::-1], seed=1)
    assert not (tmp_path / "out" / "e8p-2bit").exists()


def test_mistakes_are_found_before_anything_is_run(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(EvaluationError, match=r"pass a text for all"):
        compare(place, output, grid={"seed": [0, 1]}, eval_text=None, eval_windows=None)
    with pytest.raises(EvaluationError, match=r"pass --eval-text"):
        compare(place, output, eval_text=None)
    with pytest.raises(ModelError, match=r"1 of 2 members.*\n.*skip-"):
        compare(place, output, recipe="rtn-4bit", grid={"skip": [[], ["."]]})
    assert not output.exists()


def test_held_out_sequences_are_shared(place: Path, undrawn: None, tmp_path: Path) -> None:
    found = compare(place, tmp_path / "out", eval_text=None, eval_windows=None)
    alone = api.quantize(
        place / "model",
        tmp_path / "alone",
        recipe="e8p-2bit",
        **options(place, eval_text=None, eval_windows=None),
    )
    row = next(row for row in found.rows if row["name"] == "e8p-2bit")
    assert row["evaluation"] == alone.evaluation
    assert len(list((tmp_path / "out" / ".vqllm").glob("sequences-*"))) == 1


def test_without_checkpoints_reports_stay(
    place: Path, whole: Path, undrawn: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    compare(place, output, keep_checkpoints=False)
    for name in RECIPES:
        left = {path.name for path in (output / name).iterdir()}
        assert left == {"report.md", "report.jsonl", "proxy_loss.png"}
    assert lasting(output) == lasting(whole)
    monkeypatch.setattr(quantization, "run", lambda *_, **__: pytest.fail("a member was run"))
    compare(place, output)
    assert lasting(output) == lasting(whole)


TUNED = "tune={calibration: {length: 32, sequences: 40}, stages: [{type: end_to_end, steps: 20}]}"


def tuned(*changes: str) -> Recipe:
    recipe = recipes.load("e8p-2bit", (*SMALL, TUNED, *changes))
    return recipe.model_copy(update={"name": "tuned"})


def compare_tuned(place: Path, output: Path, **changes: Any) -> ComparisonResult:
    return compare(place, output, **{"recipe": [tuned()], "changes": (), **changes})


@pytest.fixture(scope="module")
def with_tuned(place: Path) -> Path:
    """A comparison of a recipe with `tune` and the same without."""
    output = place / "with-tuned"
    plain = tuned("tune=null").model_copy(update={"name": "plain"})
    assert not compare_tuned(place, output, recipe=[plain, tuned()]).failed
    return output


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_tuned_member_is_what_quantize_makes(place: Path, with_tuned: Path) -> None:
    given = options(place, changes=())
    alone = api.quantize(place / "model", place / "tuned-alone", recipe=tuned(), **given)
    rows = {
        row["name"]: row for row in json.loads((with_tuned / "comparison.json").read_text())["rows"]
    }
    row = rows["tuned"]
    assert row["evaluation"] == alone.evaluation
    assert row["evaluation"]["kl"] < 0.95 * rows["plain"]["evaluation"]["kl"]
    assert (row["bytes"], row["bits_per_weight"]) == (alone.bytes_after, alone.bits_per_weight)
    assert row["bytes"] > rows["plain"]["bytes"]
    assert folder_bytes(with_tuned / "tuned") == folder_bytes(place / "tuned-alone") != {}
    assert not (with_tuned / "tuned" / ".vqllm").exists()
    phases = ["calibration text", "quantization", "tuning", "evaluation"]
    assert sorted(row["cost"]["seconds"]) == sorted(phases)
    assert row["cost"]["whole"] is True


def test_the_table_says_what_tuned_a_member(with_tuned: Path) -> None:
    page = (with_tuned / "comparison.md").read_text()
    assert "| [tuned + end_to_end](tuned/report.md) |" in page
    assert "| [plain](plain/report.md) |" in page
    assert "Tuning: end_to_end" in (with_tuned / "tuned" / "report.md").read_text()


def test_text_to_tune_on_is_shared(place: Path, with_tuned: Path) -> None:
    # Two recipes: one text to round on, and one to tune on.
    assert len(list((with_tuned / ".vqllm").glob("sequences-*"))) == 2


# The first 12 events are those of rounding; then come text, predictions, and 20 steps.
@pytest.mark.parametrize("event", slow_but([33], [8, 13, 33]))
def test_a_stopped_tuned_member_goes_on_to_the_same_result(
    event: int, place: Path, with_tuned: Path, undrawn: None, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        compare_tuned(place, tmp_path / "out", progress=KillAt(event))
    found = compare_tuned(place, tmp_path / "out")
    (row,) = found.rows
    assert row["cost"]["whole"] is False
    (row,) = lasting(tmp_path / "out")["rows"]
    expected = next(row for row in lasting(with_tuned)["rows"] if row["name"] == "tuned")
    for key in ("evaluation", "bytes", "bits_per_weight", "recipe"):
        assert row[key] == expected[key]
    assert folder_bytes(tmp_path / "out" / "tuned") == folder_bytes(with_tuned / "tuned") != {}


def test_a_tuned_member_stopped_after_its_measurement_is_closed_and_not_measured_again(
    place: Path, with_tuned: Path, undrawn: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(TunedWriter, "complete", killed)
        with pytest.raises(Killed):
            compare_tuned(place, tmp_path / "out")
    kept = tmp_path / "out" / ".vqllm" / "results" / "tuned.json"
    before = kept.read_bytes()
    monkeypatch.setattr(MEASURED, lambda *_: pytest.fail("measured again"))
    (row,) = compare_tuned(place, tmp_path / "out").rows
    assert kept.read_bytes() == before
    assert row["name"] == "tuned"
    assert folder_bytes(tmp_path / "out" / "tuned") == folder_bytes(with_tuned / "tuned") != {}


def test_another_tuning_of_the_same_name_is_refused(
    place: Path, with_tuned: Path, undrawn: None, tmp_path: Path
) -> None:
    other = tuned("tune.stages.0.steps=21")
    with pytest.raises(CheckpointError, match=r"tune\.stages\.0\.steps: 20 → 21"):
        compare_tuned(place, with_tuned, recipe=[other])
    for event in (8, 33):  # in the rounding, in the tuning
        output = tmp_path / str(event)
        with pytest.raises(Killed):
            compare_tuned(place, output, progress=KillAt(event))
        # Found before the member before it is run.
        with pytest.raises(CheckpointError, match=r"differs.*\n.*seed: 0 → 1"):
            compare_tuned(place, output, recipe=["rtn-4bit", tuned("seed=1")])
        assert not (output / "rtn-4bit").exists()
        with pytest.raises(CheckpointError, match="unfinished run of a recipe with `tune`"):
            compare_tuned(place, output, recipe=["rtn-4bit", tuned("tune=null")])
    with pytest.raises(CheckpointError, match=r"differs.*\n.*stages\.0\.steps: 20 → 21"):
        compare_tuned(place, output, recipe=["rtn-4bit", other])


def test_nobody_is_measured_on_what_another_one_was_tuned_on(
    place: Path, undrawn: None, tmp_path: Path
) -> None:
    held_out = {"eval_text": None, "eval_windows": None}
    with pytest.raises(EvaluationError, match=r"calibrated or tuned on different sequences"):
        compare_tuned(place, tmp_path / "out", **held_out)
    same = tuned("tune.calibration.sequences=4")
    (row,) = compare_tuned(place, tmp_path / "out", recipe=[same], **held_out).rows
    assert "held-out sequences of 32 tokens (text.txt)" in row["evaluation"]["text"]


def test_a_tuned_member_without_its_checkpoint(
    place: Path, with_tuned: Path, undrawn: None, tmp_path: Path
) -> None:
    compare_tuned(place, tmp_path / "out", keep_checkpoints=False)
    left = {path.name for path in (tmp_path / "out" / "tuned").iterdir()}
    assert left == {"report.md", "report.jsonl", "proxy_loss.png"}


def test_command(place: Path, whole: Path, tmp_path: Path) -> None:
    arguments = [
        *("compare", place / "model", "--output", whole, "--recipe", "rtn-4bit,e8p-2bi[t]"),
        *("--calibration", place / "text.txt", "--eval-text", place / "text.txt"),
        *("--eval-windows", 2, "--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"),
        *(word for change in SMALL for word in ("--set", change)),
    ]
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(
        (whole / "comparison.json").read_text()
    )
    assert (tmp_path / "out.png").read_bytes() == (whole / "comparison.png").read_bytes()
    (line,) = [line for line in done.stdout.splitlines() if "e8p-2bit" in line]
    row = next(row for row in lasting(whole)["rows"] if row["name"] == "e8p-2bit")
    assert f"{row['evaluation']['kl']:.4f}" in line
    assert "1 of 1" in line
    failing = [str(a) for a in arguments] + ["--grid", "calibration.sequences=100000"]
    failing[3] = str(tmp_path / "failing")
    done = CliRunner().invoke(cli.app, failing, catch_exceptions=False)
    assert done.exit_code == 1
    assert "e8p-2bit_sequences-100000 failed: CalibrationError" in done.stdout


def test_a_second_run_has_a_bar_of_its_own() -> None:
    from rich.progress import Progress

    from vqllm.core.progress_bar import BarProgress

    with Progress(disable=True) as bar:
        progress = BarProgress(bar)
        for num_layers in (3, 5):
            progress.layers(num_layers, 0)
            assert [task.total for task in bar.tasks] == [num_layers]


def test_it_says_how_much_is_to_be_done(
    place: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "vqllm"):
        vqllm.compare(place / "model", whole, "rtn-4bit", **options(place))
    assert "1 members, 1 of them finished" in caplog.text
