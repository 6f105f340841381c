"""Tuning of a quantized tiny model, as a user meets it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.support.params import slow
from tests.support.tiny import TEXT, save_tiny
from vqllm import api, cli
from vqllm.checkpoint.reader import Checkpoint
from vqllm.checkpoint.resume import tuned_writer as tuned
from vqllm.errors import (
    CalibrationError,
    CheckpointError,
    EvaluationError,
    ModelError,
    RecipeError,
)
from vqllm.recipes import Recipe, TuningRecipe, from_dict, tuning_from_dict

QUANTIZE = from_dict(
    {
        "name": "rounded",
        "calibration": {"sequences": 6, "length": 32},
        "transforms": [{"type": "hadamard", "side": "both"}],
        "codec": {"type": "e8p"},
        "rounding": {"type": "nearest"},
    },
    "rounded",
)


def recipe(teacher: str = "cached", shard: bool = False, **stage: object) -> TuningRecipe:
    stage = {"type": "end_to_end", "steps": 30, "rate": 0.02, "batch": 4, **stage}
    values = {
        "name": "tuned",
        "calibration": {"sequences": 40, "length": 32},
        "stages": [stage],
        "teacher": teacher,
        "shard": shard,
    }
    return tuning_from_dict(values, "tuned")


@pytest.fixture(scope="module")
def rounded(root: Path, source: Path, text: Path) -> Path:
    api.quantize(
        source, root / "rounded", recipe=QUANTIZE, calibration=text, evaluate=False, device="cpu"
    )
    return root / "rounded"


def run(rounded: Path, output: Path, text: Path, **options: object):
    given = {"recipe": recipe(), "calibration": text, "device": "cpu", **options}
    return api.tune(rounded, output, **given)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes().replace(folder.name.encode(), b"OUT")
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(root: Path, rounded: Path, text: Path):
    return run(rounded, root / "finished", text)


def test_the_preset_trains_layers_and_then_scales(root: Path, source: Path, text: Path) -> None:
    small = ("calibration.sequences=16", "calibration.length=32")
    summary = api.quantize(
        source,
        root / "preset",
        bits=3,
        preset="tuned",
        calibration=text,
        changes=(
            *small,
            *(f"tune.{change}" for change in small),
            "layer.steps=4",
            "tune.stages.0.steps=4",
        ),
        device="cpu",
    )
    (told,) = summary.tuning
    assert [look["step"] for look in told["history"]] == [0, 1, 2, 3, 4]
    records = map(json.loads, (root / "preset" / "report.jsonl").read_text().splitlines())
    trained = [record["training"]["best_step"] for record in records if "training" in record]
    assert len(trained) == 14
    assert max(trained) > 0


def test_it_predicts_more_like_the_original(finished, source, rounded, text) -> None:
    (told,) = finished.tuning
    before, after = told["history"][0]["held_out_kl"], finished.evaluation["kl"]
    assert after < 0.8 * before
    # What was written predicts what was trained, but for the rounding of scales to float16.
    assert after == pytest.approx(min(h["held_out_kl"] for h in told["history"]), rel=0.05)


def test_the_checkpoint_is_one_like_any_other(finished, rounded, source) -> None:
    checkpoint, before = Checkpoint.open(finished.output), Checkpoint.open(rounded)
    assert checkpoint.linears.keys() == before.linears.keys()
    for name, spec in checkpoint.linears.items():
        assert spec.transforms[0].kind == "scale"
        old = before.packed(name)
        assert torch.equal(checkpoint.packed(name)["codes"], old["codes"])
    assert checkpoint.quantization.extra["tuning"][0]["recipe"]["name"] == "tuned"
    assert checkpoint.quantization.extra["recipe"]["name"] == "rounded"
    model, tokenizer = api.load(finished.output)
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    assert tokenizer is not None
    bits = finished.bits_per_weight
    stored = sum(checkpoint.bits(name).total for name in checkpoint.linears)
    weights = sum(spec.rows * spec.cols for spec in checkpoint.linears.values())
    assert bits["all of a quantized linear"] == pytest.approx(stored / weights)
    for name, record in checkpoint.records().items():
        told = record["bits_codes"] + record["bits_codebook"] + record["bits_side"]
        assert told == checkpoint.bits(name).total
    page = (finished.output / "report.md").read_text()
    assert "Tuning: end_to_end, best after" in page


def test_the_same_bytes_again(finished, root, rounded, text) -> None:
    run(rounded, root / "again", text)
    one, other = files(finished.output), files(root / "again")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(folder).items() if name.endswith(".safetensors")}


def test_a_teacher_in_memory_gives_the_same_weights(finished, root, rounded, text) -> None:
    live = run(rounded, root / "live", text, recipe=recipe("live"))
    assert weights(live.output) == weights(finished.output) != {}
    assert live.tuning == finished.tuning
    assert live.evaluation == finished.evaluation


def test_activations_computed_again_give_the_same_weights(finished, root, rounded, text) -> None:
    again = run(rounded, root / "again-inside", text, recipe=recipe(checkpointing=True))
    assert weights(again.output) == weights(finished.output) != {}


def test_windows_of_a_text_are_measured_alike(finished, root, rounded, text) -> None:
    options = {"eval_text": text, "eval_windows": 2}
    few = {"steps": 2}
    cached = run(rounded, root / "windows", text, recipe=recipe(**few), **options)
    live = run(rounded, root / "windows-live", text, recipe=recipe("live", **few), **options)
    assert cached.evaluation == live.evaluation
    assert not (cached.output / ".vqllm").exists()


def test_a_run_that_goes_on_is_measured_on_its_own_windows(root, rounded, text, monkeypatch):
    (root / "other.txt").write_text(" ".join(reversed((TEXT * 60).split())))
    few, options = recipe(steps=2), {"eval_text": root / "other.txt", "eval_windows": 1}

    def stopping(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vqllm.evaluation.perplexity.compare", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(rounded, root / "own", text, recipe=few, eval_text=text, eval_windows=1)
    monkeypatch.undo()
    again = run(rounded, root / "own", text, recipe=few, **options)
    fresh = run(rounded, root / "own-fresh", text, recipe=few, **options)
    assert again.evaluation == fresh.evaluation


def test_a_run_goes_on_with_the_teacher_in_memory(finished, root, rounded, text, monkeypatch):
    output = root / "changed-its-mind"

    def stopping(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuned.TunedWriter, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(rounded, output, text)
    assert (output / ".vqllm" / "teacher-0.bin").stat().st_size == 56 * 32 * 64 * 2
    monkeypatch.undo()
    assert weights(run(rounded, output, text, recipe=recipe("live")).output) == weights(
        finished.output
    )
    assert not (output / ".vqllm").exists()


@pytest.mark.parametrize("stop", [slow(1), 5])
def test_an_interrupted_run_goes_on(finished, root, rounded, text, stop, monkeypatch) -> None:
    output = root / f"stopped-{stop}"
    keep, calls = tuned.TunedWriter.save_record, []

    def stopping(self, name, told, tensors) -> None:
        keep(self, name, told, tensors)
        calls.append(name)
        if len(calls) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(tuned.TunedWriter, "save_record", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(rounded, output, text)
    assert not (output / "config.json").exists()
    monkeypatch.undo()
    run(rounded, output, text)
    one, other = files(finished.output), files(output)
    assert [name for name in one if one[name] != other[name]] == []
    assert not (output / ".vqllm").exists()


def test_a_run_with_other_settings_is_refused(root, rounded, text, monkeypatch) -> None:
    output = root / "differs"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuned.TunedWriter, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        run(rounded, output, text, recipe=recipe(steps=2))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"stages\.0\.steps: 2 → 3"):
        run(rounded, output, text, recipe=recipe(steps=3))


def test_a_run_does_not_go_on_with_another_teacher(root, source, rounded, text, monkeypatch):
    teacher, output = shutil.copytree(source, root / "changing"), root / "of-another"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuned.TunedWriter, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        run(rounded, output, text, recipe=recipe(steps=2), teacher=teacher)
    monkeypatch.undo()
    save_tiny(teacher, "qwen2", seed=1)
    with pytest.raises(CheckpointError, match=r"settings\.teacher_files\.model\.safetensors"):
        run(rounded, output, text, recipe=recipe(steps=2), teacher=teacher)


def test_a_tuned_checkpoint_is_tuned_again(finished, root, text) -> None:
    again = run(finished.output, root / "twice", text, recipe=recipe(steps=4), evaluate=False)
    extra = Checkpoint.open(again.output).quantization.extra
    assert len(extra["tuning"]) == 2
    before = Checkpoint.open(finished.output)
    assert Checkpoint.open(again.output).linears == before.linears  # no scale upon scale


@pytest.mark.parametrize(
    "train", [slow(("columns",)), slow(("head",)), ("rows", "columns", "vectors", "head")]
)
def test_kinds_of_parameters(root, rounded, text, train) -> None:
    output = root / "-".join(train)
    told = run(rounded, output, text, recipe=recipe(train=train, steps=10, head_rate=0.01))
    history = told.tuning[0]["history"]
    assert told.evaluation["kl"] < history[0]["held_out_kl"]
    best = min(look["held_out_kl"] for look in history)
    assert told.evaluation["kl"] == pytest.approx(best, rel=0.05)


def test_what_a_codec_does_not_have_is_refused_before_the_original_runs(root, rounded, text):
    output = root / "no-codebooks"
    with pytest.raises(ModelError, match=r"end_to_end: nothing to tune: .* none of codebooks"):
        run(rounded, output, text, recipe=recipe(train=["codebooks"]))
    assert not list(output.rglob("teacher*"))


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"arch": "opt"}, "the teacher has no such tensor"),
        ({"intermediate_size": 96}, r"of \S+mlp\.gate_proj\.weight .* the teacher has 96 x 64"),
        ({"num_hidden_layers": 3}, r"of \S+layers\.2\.\S+ .* has no such tensor, and .* has 64"),
        ({"vocab_size": 400}, r"of \S+embed_tokens\.weight .* has 384 x 64, .* has 400 x 64"),
    ],
)
def test_a_teacher_that_does_not_fit(root, rounded, text, tmp_path, config, what) -> None:
    other = save_tiny(tmp_path / "other", **{"arch": "qwen2", **config})
    with pytest.raises(ModelError, match=f"the teacher does not fit: .*{what}"):
        run(rounded, tmp_path / "out", text, teacher=other)
    assert not (tmp_path / "out").exists()


def test_a_quantized_teacher_is_refused(rounded, text, tmp_path) -> None:
    with pytest.raises(ModelError, match="is a quantized checkpoint itself"):
        run(rounded, tmp_path / "out", text, teacher=rounded)


def test_the_checkpoint_itself_is_no_output(rounded, text) -> None:
    before = files(rounded)
    with pytest.raises(CheckpointError, match="is the checkpoint that is to be tuned"):
        run(rounded, rounded.parent / ".." / rounded.parent.name / rounded.name, text)
    assert files(rounded) == before


def test_a_teacher_with_another_vocabulary(root, source, rounded, text) -> None:
    other = shutil.copytree(source, root / "renamed")
    file = other / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    a, b = sorted(vocabulary)[:2]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(values))
    with pytest.raises(ModelError, match="another vocabulary"):
        run(rounded, root / "wrong-3", text, teacher=other)


def test_a_checkpoint_that_names_no_teacher(
    root, source, rounded, text, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("VQLLM_CACHE", str(tmp_path))  # as on another machine
    older = shutil.copytree(rounded, root / "older")
    values = json.loads((older / "config.json").read_text())
    del values["quantization_config"]["source"]
    (older / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="pass it with --teacher"):
        run(older, root / "wrong-4", text)
    values["quantization_config"]["source"] = {"model": "models/gone"}
    (older / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="made from 'models/gone', which is not found from here"):
        run(older, root / "wrong-4", text)
    assert run(older, root / "given", text, teacher=source, recipe=recipe(steps=2), evaluate=False)


def test_the_original_is_found_from_another_working_directory(
    root, source, text, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(source.parent)
    given = {"calibration": text, "evaluate": False, "device": "cpu"}
    api.quantize(source.name, root / "by-name", recipe=QUANTIZE, **given)
    monkeypatch.chdir(tmp_path)
    few = recipe(steps=2)
    run(root / "by-name", root / "from-elsewhere", text, recipe=few, evaluate=False)
    extra = Checkpoint.open(root / "from-elsewhere").quantization.extra
    assert extra["source"]["model"] == extra["tuning"][0]["teacher"] == source.name


def test_a_text_that_is_not_there_leaves_no_folder(root, rounded) -> None:
    with pytest.raises(CalibrationError, match="nowhere"):
        run(rounded, root / "wrong-5", root / "nowhere.txt")
    assert not (root / "wrong-5").exists()


def test_a_number_of_windows_needs_a_text(source, rounded, text, tmp_path) -> None:
    with pytest.raises(EvaluationError, match=r"pass --eval-text FILE as well"):
        run(rounded, tmp_path / "out", text, eval_windows=3)
    with pytest.raises(EvaluationError, match=r"pass --eval-text FILE as well"):
        api.quantize(source, tmp_path / "out", recipe=QUANTIZE, calibration=text, eval_windows=3)


def test_out_of_memory_says_what_to_lower(root, source, rounded, text, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("vqllm.tuning.end_to_end.divergence", full)
    with pytest.raises(ModelError, match=r"--set stages\.0\.together=1"):
        run(rounded, root / "full", text, recipe=recipe(steps=2))
    with pytest.raises(ModelError, match=r"--set tune\.stages\.0\.together=1"):
        api.quantize(source, root / "full-2", recipe=whole(), calibration=text, device="cpu")
    monkeypatch.undo()
    values = recipe().to_dict()
    values["stages"].insert(0, {"type": "layer"})
    monkeypatch.setattr("vqllm.tuning.layer.output_error", full)
    with pytest.raises(ModelError) as caught:
        run(rounded, root / "full-3", text, recipe=tuning_from_dict(values, "two"))
    monkeypatch.undo()
    assert "--set stages.0.together=1 --set stages.1.together=1, or" in str(caught.value)
    assert "again, --set stages.1.checkpointing=true. If" in str(caught.value)
    # What it says works, in the same folder.
    run(rounded, root / "full", text, recipe=recipe(steps=2, together=1), evaluate=False)
    assert Checkpoint.open(root / "full").quantization.extra["tuning"]


def test_an_ordinary_model_is_refused(root, source, text) -> None:
    with pytest.raises(CheckpointError, match="quantize it first"):
        run(source, root / "wrong-6", text)


def test_the_command(root, rounded, text, tmp_path) -> None:
    file = tmp_path / "tuning.yaml"
    file.write_text(recipe(steps=3).to_yaml())
    options = ["--recipe", file, "--calibration", text, "--time", "10m", "--set", "seed=3"]
    arguments = ["tune", rounded, "--output", tmp_path / "out", "--device", "cpu", *options]
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert "end_to_end, held-out sequences" in result.output
    told = Checkpoint.open(tmp_path / "out").quantization.extra["tuning"][0]["recipe"]
    assert (told["seed"], told["stages"][0]["time"]) == (3, "10m")


def whole(**stage: object) -> Recipe:
    values = QUANTIZE.to_dict()
    stages = {"calibration": {"sequences": 40, "length": 32}, "stages": recipe(**stage).stages}
    return from_dict({**values, "tune": stages}, "whole")


def test_a_recipe_that_quantizes_and_tunes(finished, root, source, text) -> None:
    given = {"recipe": whole(), "calibration": text, "device": "cpu"}
    summary = api.quantize(source, root / "whole", **given)
    assert summary.evaluation["kl"] == pytest.approx(finished.evaluation["kl"], rel=1e-6)
    one, other = Checkpoint.open(finished.output), Checkpoint.open(root / "whole")
    assert one.linears == other.linears
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.tensors)
    assert not (root / "whole" / ".vqllm").exists()


def test_such_a_recipe_goes_on_where_it_was(root, source, text, monkeypatch) -> None:
    given = {"calibration": text, "device": "cpu", "evaluate": False}

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuned.TunedWriter, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        api.quantize(source, root / "halfway", recipe=whole(steps=3), **given)
    monkeypatch.undo()
    other = whole(steps=3).model_copy(update={"seed": 5})
    with pytest.raises(CheckpointError, match="unfinished run that differs"):
        api.quantize(source, root / "halfway", recipe=other, **given)
    monkeypatch.setattr("vqllm.runs.quantize.run_pipeline", killed)  # it is not quantized again
    api.quantize(source, root / "halfway", recipe=whole(steps=3), **given)
    assert Checkpoint.open(root / "halfway").quantization.extra["tuning"]
    with pytest.raises(CheckpointError, match="holds a finished checkpoint"):
        api.quantize(source, root / "halfway", recipe=whole(steps=3), **given)


def test_a_mistake_in_what_follows_leaves_what_is_rounded(root, source, text, monkeypatch) -> None:
    given = {"calibration": text, "device": "cpu", "evaluate": False}
    output, short = root / "too-many", whole(steps=3)
    calibration = short.tune.calibration.model_copy(update={"sequences": 10**5})
    many = short.model_copy(
        update={"tune": short.tune.model_copy(update={"calibration": calibration})}
    )
    with pytest.raises(CalibrationError, match="too little text"):
        api.quantize(source, output, recipe=many, **given)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vqllm.runs.quantize.run_pipeline", killed)  # it is not quantized again
    monkeypatch.setattr(tuned.TunedWriter, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        api.quantize(source, output, recipe=short, **given)
    with pytest.raises(CheckpointError, match=r"vqllm tune \S+rounded --output OTHER tunes them"):
        api.quantize(source, output, recipe=whole(steps=4), **given)
    monkeypatch.undo()
    run(output / ".vqllm" / "rounded", root / "otherwise", text, recipe=recipe(steps=4))


def test_sequences_that_are_too_long_are_refused_before_rounding(root, text, tmp_path) -> None:
    model = save_tiny(tmp_path / "model", "opt", max_position_embeddings=40)
    changed = whole().to_dict()
    changed["tune"]["calibration"]["length"] = 64
    given = {"calibration": text, "eval_text": text, "device": "cpu"}
    for make in (api.quantize, api.compare):
        with pytest.raises(CalibrationError, match=r"choose a smaller tune\.calibration\.length"):
            make(model, tmp_path / "out", recipe=from_dict(changed, "whole"), **given)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize("tunes_first", [True, False])
def test_runs_with_and_without_tuning_keep_apart(
    root, source, text, tunes_first, monkeypatch
) -> None:
    given = {"calibration": text, "device": "cpu", "evaluate": False}
    output = root / f"apart-{tunes_first}"
    first, second = (whole(), QUANTIZE) if tunes_first else (QUANTIZE, whole())

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vqllm.checkpoint.resume.layer_writer.LayerWriter.finish", killed)
    with pytest.raises(KeyboardInterrupt):
        api.quantize(source, output, recipe=first, **given)
    monkeypatch.undo()
    kept = files(output)
    kind = "with" if tunes_first else "without"
    with pytest.raises(CheckpointError, match=f"unfinished run of a recipe {kind} `tune`"):
        api.quantize(source, output, recipe=second, **given)
    assert files(output) == kept
    api.quantize(source, output, recipe=first, **given)


LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes")


def launch(
    num: int, *arguments: object, launcher: tuple[str, ...] = LAUNCHER
) -> subprocess.CompletedProcess[str]:
    root = Path(cli.__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*launcher, str(num), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=500,  # only what hangs takes as long
    )


@pytest.mark.slow
def test_two_processes_tune_as_one_does(finished, source, root, rounded, text) -> None:
    file = root / "tuning.yaml"
    file.write_text(recipe().to_yaml())
    options = ("--recipe", file, "--calibration", text, "--device", "cpu")
    result = launch(2, "-m", "vqllm", "tune", rounded, "--output", root / "two", *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("end_to_end, held-out sequences") == 1  # only one of them talks
    measured = api.evaluate(
        root / "two", baseline=source, text=text, num_windows=4, window_length=64, device="cpu"
    )
    wanted = api.evaluate(
        root / "finished", baseline=source, text=text, num_windows=4, window_length=64, device="cpu"
    )
    assert measured["text"]["kl"] == pytest.approx(wanted["text"]["kl"], rel=0.05)
    one, two = Checkpoint.open(finished.output), Checkpoint.open(root / "two")
    assert one.linears == two.linears
    for name, tensor in one.tensors.items():
        a, b = one.read(name), two.read(name)
        assert a.dtype == b.dtype
        if not a.is_floating_point():
            assert torch.equal(a, b)
        elif tensor.numel > 1:
            # Sums in another order, in bfloat16. Adam makes as much of the gradient of a key's
            # bias, which is nothing but rounding, as of any other: 0.035 there.
            error = (a.float() - b.float()).norm() / a.float().norm()
            assert error < 0.1, name


@pytest.mark.slow
def test_two_processes_follow_either_teacher_alike(root, rounded, text) -> None:
    """However they were started."""
    for teacher, launcher in (("cached", LAUNCHER), ("live", ACCELERATE)):
        file = root / f"{teacher}.yaml"
        file.write_text(recipe(teacher, steps=4).to_yaml())
        options = ("--recipe", file, "--calibration", text, "--device", "cpu", "--no-eval")
        command = ("-m", "vqllm", "tune", rounded, "--output", root / f"two-{teacher}")
        result = launch(2, *command, *options, launcher=launcher)
        assert result.returncode == 0, result.stderr
    assert weights(root / "two-cached") == weights(root / "two-live") != {}


@pytest.mark.slow
def test_sharded_it_gives_the_same_weights(root, rounded, text) -> None:
    """Steps of 3 sequences: one of the two processes has fewer, and runs along."""
    for shard in (False, True):
        file = root / f"shard-{shard}.yaml"
        values = recipe(shard=shard, steps=4, batch=3, together=1, checkpointing=True).to_yaml()
        file.write_text(values)
        options = ("--recipe", file, "--calibration", text, "--device", "cpu", "--no-eval")
        output = root / f"two-shard-{shard}"
        result = launch(2, "-m", "vqllm", "tune", rounded, "--output", output, *options)
        assert result.returncode == 0, result.stderr
    assert weights(root / "two-shard-True") == weights(root / "two-shard-False") != {}


def test_one_process_has_nothing_to_share(root, source, rounded, text) -> None:
    with pytest.raises(RecipeError, match="over several processes, and there is one"):
        run(rounded, root / "alone", text, recipe=recipe(shard=True))
    alone = whole().model_copy(update={"tune": recipe(shard=True)})
    given = {"recipe": alone, "calibration": text, "eval_text": text, "device": "cpu"}
    for make in (api.quantize, api.compare):  # before anything is rounded
        with pytest.raises(RecipeError, match=r"tune\.shard splits a model over several"):
            make(source, root / "alone-2", **given)
        assert not list((root / "alone-2").rglob("*.safetensors"))
    with pytest.raises(RecipeError, match="a live teacher would be whole in every process"):
        recipe("live", shard=True)
    with pytest.raises(RecipeError, match="weights that stay as they are, and codebooks move"):
        recipe(shard=True, train=["rows", "codebooks"])


@pytest.mark.slow
def test_a_mistake_ends_all_processes(root, rounded, text) -> None:
    (root / "full-folder").mkdir()
    (root / "full-folder" / "notes.txt").write_text("mine")
    options = ("--calibration", text, "--device", "cpu")
    result = launch(2, "-m", "vqllm", "tune", rounded, "--output", root / "full-folder", *options)
    assert result.returncode != 0
    assert "is not empty: notes.txt" in result.stderr


PROGRAM = """
import os, sys
import torch
import vqllm
from vqllm.tuning import end_to_end

def full(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")

if os.environ["RANK"] == "1":
    end_to_end.divergence = full
rounded, output, text = sys.argv[1:]
few = ("calibration.length=32", "calibration.sequences=40")
vqllm.tune(rounded, output, calibration=text, device="cpu", changes=few)
"""


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_others(root, rounded, text, tmp_path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    result = launch(2, tmp_path / "program.py", rounded, root / "half-full", text)
    assert result.returncode != 0
    assert "out of memory. What was tuned is kept" in result.stderr
    assert "--set stages.0.checkpointing=true. If" in result.stderr
