"""The stage that tunes layer by layer, on a quantized tiny model."""

import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.e2e.test_tune import QUANTIZE, files, launch
from vqllm import api
from vqllm.checkpoint.reader import Checkpoint
from vqllm.checkpoint.resume import tuned_writer as tuned
from vqllm.core import metrics
from vqllm.errors import RecipeError
from vqllm.recipes import TuningRecipe, tuning_from_dict
from vqllm.runs import tune as teaching
from vqllm.tuning import by_layers
from vqllm.tuning import layer as layer_stage


def recipe(**stage: object) -> TuningRecipe:
    stage = {"type": "layer", "steps": 24, "batch": 4, "rate": 0.01, **stage}
    values = {
        "name": "tuned",
        "calibration": {"sequences": 24, "length": 32},
        "stages": [stage],
    }
    return tuning_from_dict(values, "tuned")


@pytest.fixture(scope="module")
def rounded(root: Path, source: Path, text: Path) -> Path:
    api.quantize(
        source, root / "rounded", recipe=QUANTIZE, calibration=text, evaluate=False, device="cpu"
    )
    return root / "rounded"


def run(rounded: Path, output: Path, text: Path, **options: object):
    given = {"recipe": recipe(), "calibration": text, "device": "cpu", "evaluate": False}
    summary = api.tune(rounded, output, **{**given, **options})
    assert summary is not None
    return summary


@pytest.fixture(scope="module")
def finished(root: Path, rounded: Path, text: Path):
    return run(rounded, root / "finished", text, evaluate=True)


def states(folder: Path, tokens: Tensor, layer: int) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.set_attn_implementation("eager")
    seen: list[Tensor] = []
    model.model.layers[layer].register_forward_hook(lambda _, args, output: seen.append(output))
    with torch.no_grad():
        model(tokens)
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize("layer", [0, 1])
def test_the_written_layers_are_as_near_as_was_found(
    finished, rounded, source, text, layer, monkeypatch, root
) -> None:
    seen = []
    run_stage = layer_stage.Layer.__call__

    def keep(self, task):
        seen.append(task.held_out)
        return run_stage(self, task)

    monkeypatch.setattr(layer_stage.Layer, "__call__", keep)
    run(rounded, root / f"held-out-{layer}", text, recipe=recipe(steps=1))
    tokens = seen[0]
    wanted = states(source, tokens, layer)
    errors = [
        float(metrics.output_error(states(folder, tokens, layer), wanted))
        for folder in (rounded, finished.output)
    ]
    told = finished.tuning[0]["layers"][layer]
    assert errors[1] == pytest.approx(told["after"], rel=0.02)
    assert errors[1] < 0.9 * errors[0]
    if layer == 0:
        assert errors[0] == pytest.approx(told["before"], rel=0.02)


def test_the_report_and_the_checkpoint(finished, rounded) -> None:
    told = finished.tuning[0]
    assert [own["layer"] for own in told["layers"]] == [0, 1]
    assert told["faults"] == 0
    page = (finished.output / "report.md").read_text()
    assert "mean error of a layer's output" in page
    assert "Tuning: layer, held-out error of each layer's output" in page
    checkpoint, before = Checkpoint.open(finished.output), Checkpoint.open(rounded)
    for name, spec in checkpoint.linears.items():
        assert spec.transforms[0].kind == "scale"
        assert torch.equal(checkpoint.packed(name)["codes"], before.packed(name)["codes"])
    # What is outside the layers stays.
    name = "model.norm.weight"
    assert torch.equal(checkpoint.read(name), before.read(name))
    name = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(checkpoint.read(name), before.read(name))


@pytest.mark.parametrize("stop", [1, 2])
def test_the_same_bytes_again_and_after_a_stop(
    finished, root, rounded, text, stop, monkeypatch
) -> None:
    output = root / f"stopped-{stop}"
    keep, calls = tuned.TunedWriter.save_record, []

    def stopping(self, name, told, tensors) -> None:
        keep(self, name, told, tensors)
        if name.startswith("stage"):
            calls.append(name)
        if len(calls) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(tuned.TunedWriter, "save_record", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(rounded, output, text)
    monkeypatch.undo()
    trained = []
    train = layer_stage._Run._train

    def counted(self, index, parameters) -> None:
        trained.append(index)
        train(self, index, parameters)

    monkeypatch.setattr(layer_stage._Run, "_train", counted)
    run(rounded, output, text, evaluate=True)
    assert trained == [1][stop - 1 :]  # what was done is not done again
    one, other = files(finished.output), files(output)
    assert [name for name in one if one[name] != other[name]] == []


@pytest.mark.parametrize(
    "stage", [{"aim": "own"}, {"train": ["columns"]}, {"train": ["vectors"]}, {"together": 3}]
)
def test_options_lower_the_error(root, rounded, text, stage) -> None:
    told = run(rounded, root / "-".join(map(str, stage.items())), text, recipe=recipe(**stage))
    for own in told.tuning[0]["layers"]:
        assert own["after"] < 0.99 * own["before"]


def test_time_ends_it_between_two_layers(finished, root, rounded, text, monkeypatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(by_layers.time, "monotonic", lambda: 100.0 * next(clock))
    told = run(rounded, root / "timed", text, recipe=recipe(time="90s")).tuning[0]
    assert told["layers"] == finished.tuning[0]["layers"][:1]
    one, other, before = map(Checkpoint.open, (finished.output, root / "timed", rounded))
    name = "model.layers.{}.input_layernorm.weight"
    assert torch.equal(other.read(name.format(0)), one.read(name.format(0)))
    assert torch.equal(other.read(name.format(1)), before.read(name.format(1)))


@pytest.mark.parametrize("options", [{}, {"evaluate": True, "eval_windows": 1}])
def test_no_predictions_are_made_that_nothing_asks_for(
    root, rounded, text, options, monkeypatch
) -> None:
    asked = []
    teacher = teaching.StreamedPredictions

    def counted(open_stream, tokens, *rest):
        asked.append(len(tokens))
        return teacher(open_stream, tokens, *rest)

    monkeypatch.setattr(teaching, "StreamedPredictions", counted)
    given = {**options, "eval_text": text} if options else {}
    output = root / f"nothing-asked-{len(options)}"
    told = run(rounded, output, text, recipe=recipe(steps=2), **given)
    assert asked == ([1] if options else [])
    assert (told.evaluation is not None) == bool(options)


def test_it_goes_before_the_end_to_end_stage(root, rounded, text) -> None:
    values = recipe(steps=8).to_dict()
    values["stages"].append({"type": "end_to_end", "steps": 10, "rate": 0.01, "train": ["head"]})
    told = run(rounded, root / "both", text, recipe=tuning_from_dict(values, "both")).tuning
    assert [own["stage"] for own in told] == ["layer", "end_to_end"]
    assert told[1]["history"][-1]["held_out_kl"] < told[1]["history"][0]["held_out_kl"]


def test_a_loss_that_is_not_finite_is_said_in_the_report(root, rounded, text, monkeypatch) -> None:
    error, calls = layer_stage.output_error, []

    def broken(own: Tensor, wanted: Tensor) -> Tensor:
        value = error(own, wanted)
        if torch.is_grad_enabled():
            calls.append(None)
            value = value * float("nan") if len(calls) == 5 else value
        return value

    monkeypatch.setattr(layer_stage, "output_error", broken)
    told = run(rounded, root / "broken", text).tuning[0]
    assert [own["faults"] for own in told["layers"]] == [1, 0]
    assert all(own["after"] < own["before"] for own in told["layers"])


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"train": ["head"]}, "train.0"),
        ({"train": []}, "train"),
        ({"steps": 0}, "steps"),
        ({"time": "soon"}, "'soon' is no duration; write 90s, 20m or 1h30m"),
        ({"aim": "logits"}, "aim"),
        ({"head_rate": 0.1}, "head_rate: unknown key"),
    ],
)
def test_stages_that_are_wrong(stage, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**stage)


@pytest.mark.slow
def test_two_processes_tune_as_one_does(finished, root, rounded, text) -> None:
    file = root / "tuning.yaml"
    file.write_text(recipe().to_yaml())
    options = ("--recipe", file, "--calibration", text, "--device", "cpu", "--no-eval")
    result: subprocess.CompletedProcess[str] = launch(
        2, "-m", "vqllm", "tune", rounded, "--output", root / "two", *options
    )
    assert result.returncode == 0, result.stderr
    one, two = Checkpoint.open(finished.output), Checkpoint.open(root / "two")
    assert one.linears == two.linears
    for name in one.linears:
        a, b = (own.linears[name].dequantize(own.packed(name)) for own in (one, two))
        # A key's outputs have gradients that are nothing but rounding where biases take them.
        assert (a - b).norm() < 0.1 * a.norm(), name
