"""Training of layers between the roundings of their groups, on a tiny model."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.e2e.test_pipeline import KillAt, Killed, same_files
from tests.support.params import slow
from vqllm import api
from vqllm.calibration.data.calibration_set import calibration_sequences
from vqllm.checkpoint.packed_matrix import PackedMatrix
from vqllm.checkpoint.reader import Checkpoint
from vqllm.core import metrics
from vqllm.core.protocols import JSON
from vqllm.errors import RecipeError
from vqllm.quantization import layer_training
from vqllm.recipes import Recipe, from_dict

NUM, LENGTH = 30, 32
LAYER: JSON = {"steps": 24, "batch": 4}
SPREAD: JSON = {
    "codec": {"type": "trellis", "bits": 2, "state_bits": 6},
    "rounding": {"type": "two_sided", "rows": 16},
    "allocation": {"bits": 2.5, "codecs": [{"bits": 1}, {"bits": 2}, {"bits": 3}, {"type": "e8p"}]},
}


def recipe(layer: JSON | None = LAYER, **changes: object) -> Recipe:
    values = {
        "name": "test",
        "calibration": {"sequences": NUM, "length": LENGTH},
        "transforms": [{"type": "hadamard", "side": "both"}],
        "codec": {"type": "e8p"},
        "rounding": {"type": "ldlq"},
        "layer": layer,
    }
    return from_dict({**values, **changes}, "test recipe")


def run(source: Path, output: Path, text: Path, **options: object):
    given = {"recipe": recipe(), "calibration": text, "evaluate": False, "device": "cpu"}
    return api.quantize(source, output, **{**given, **options})


@pytest.fixture(scope="module")
def trained(root: Path, source: Path, text: Path) -> Path:
    run(source, root / "trained", text)
    return root / "trained"


def records(folder: Path) -> list[JSON]:
    return [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]


def sequences(source: Path, text: Path) -> Tensor:
    found = calibration_sequences(source, (str(text),), NUM, LENGTH, 0, torch.device("cpu"), False)
    return found.calibration


def last_states(folder: Path, tokens: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: list[Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda _, args, output: seen.append(output))
    with torch.no_grad():
        model(tokens)
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def test_the_written_checkpoint_has_the_error_that_training_found(trained, source, text) -> None:
    held_out = sequences(source, text)[[0, 10, 20]]
    wanted = last_states(source, held_out)
    error = float(metrics.output_error(last_states(trained, held_out), wanted))
    told = records(trained)[-1]["training"]
    # What is stored are scales in float16.
    assert error == pytest.approx(told["after"], rel=1e-3)


def test_training_lowers_the_error(trained, root, source, text) -> None:
    run(source, root / "untrained", text, recipe=recipe(None))
    tokens = sequences(source, text)[[0, 10, 20]]
    wanted = last_states(source, tokens)
    before, after = (
        float(metrics.output_error(last_states(folder, tokens), wanted))
        for folder in (root / "untrained", trained)
    )
    assert after < 0.8 * before
    told = [record["training"] for record in records(trained)]
    assert all(own["after"] <= own["before"] and own["faults"] == 0 for own in told)
    assert any(own["after"] < 0.8 * own["before"] for own in told)


def test_what_is_written_and_said(trained, source) -> None:
    checkpoint = Checkpoint.open(trained)
    for name, record in checkpoint.records().items():
        assert checkpoint.linears[name].transforms[0].kind == "scale"
        told = record["bits_codes"] + record["bits_codebook"] + record["bits_side"]
        assert told == checkpoint.bits(name).total
        assert record["target"] == "trained"
        assert (record["target_change"] == 0) == name.endswith(("q_proj", "k_proj", "v_proj"))
    original = AutoModelForCausalLM.from_pretrained(source)
    for name, values in original.named_parameters():
        if name.startswith("model.layers") and values.ndim == 1:
            stored = checkpoint.read(name)
            assert stored.dtype == values.dtype
            assert not torch.equal(stored, values)
    assert "held-out error of the layer's output" in (trained / "report.md").read_text()


def test_the_same_bytes_again(trained, root, source, text) -> None:
    run(source, root / "again", text)
    assert same_files(trained, root / "again")


@pytest.mark.parametrize("event", [slow(6), 13])  # in layer 0, in layer 1
def test_a_stopped_run_goes_on_to_the_same_bytes(trained, root, source, text, event) -> None:
    output = root / f"stopped-{event}"
    with pytest.raises(Killed):
        run(source, output, text, progress=KillAt(event))
    run(source, output, text)
    assert same_files(trained, output)


def test_states_in_mapped_files_give_the_same_bytes(
    trained, root, source, text, monkeypatch
) -> None:
    from vqllm.quantization import loop as pipeline

    monkeypatch.setitem(pipeline.Job.__init__.__kwdefaults__, "activation_budget", 1)
    run(source, root / "mapped", text)
    assert same_files(trained, root / "mapped")
    assert not list((root / "mapped").rglob("*.bin"))


@pytest.mark.parametrize(
    ("layer", "changes"),
    [
        slow({"train": ["weights"]}, {}),
        slow({"aim": "own"}, {}),
        ({"train": ["rows", "vectors"]}, {"target": {"of": "residual"}}),
        ({}, SPREAD),
        slow({}, {"hessian": {"refresh": "layer"}}),
        slow({}, {"skip": ["k_proj", r"layers\.1\.mlp"]}),
    ],
    ids=["weights", "own", "residual", "spread", "refresh", "skip"],
)
def test_every_kind_of_run_lowers_the_error_and_goes_on(
    root, source, text, layer, changes, request
) -> None:
    name = request.node.callspec.id
    changed = recipe({**LAYER, **layer}, **changes)
    run(source, root / name, text, recipe=changed)
    told = [record["training"] for record in records(root / name) if "training" in record]
    assert sum(own["after"] for own in told) < 0.97 * sum(own["before"] for own in told)
    checkpoint = Checkpoint.open(root / name)
    bits = sum(checkpoint.bits(name).total for name in checkpoint.linears)
    if "allocation" in changes:  # scales of rows are within the budget
        weights = sum(spec.rows * spec.cols for spec in checkpoint.linears.values())
        assert bits <= 2.5 * weights
    with pytest.raises(Killed):
        run(source, root / f"{name}-stopped", text, recipe=changed, progress=KillAt(12))
    run(source, root / f"{name}-stopped", text, recipe=changed)
    assert same_files(root / name, root / f"{name}-stopped")


@pytest.mark.parametrize("kind", ["weights", "rows", "vectors"])
def test_each_kind_alone_moves_and_is_what_the_layer_runs_with(
    root, source, text, kind, monkeypatch
) -> None:
    train, seen = layer_training.LayerTrainer.train, []

    def looking(self, names, rounded) -> list[PackedMatrix]:
        done = train(self, names, rounded)
        seen.extend(torch.equal(at.parameter, value) for at, value in self._values().items())
        return done

    monkeypatch.setattr(layer_training.LayerTrainer, "train", looking)
    run(source, root / f"only-{kind}", text, recipe=recipe({**LAYER, "train": [kind]}))
    assert seen
    assert all(seen)  # also while the Hessian of the next group is measured
    told = [own["training"] for own in records(root / f"only-{kind}") if "training" in own]
    assert sum(own["after"] for own in told) < 0.99 * sum(own["before"] for own in told)


def test_a_training_that_is_not_finite_is_said_in_the_report(
    root, source, text, monkeypatch
) -> None:
    loss, calls = layer_training.LayerTrainer._loss, []

    def broken(self, step: int) -> list[Tensor]:
        calls.append(step)
        parts = loss(self, step)
        return [part * float("nan") for part in parts] if len(calls) == 10 else parts

    monkeypatch.setattr(layer_training.LayerTrainer, "_loss", broken)
    run(source, root / "broken", text)
    faults = [record["training"]["faults"] for record in records(root / "broken")]
    assert faults[:3] == [1, 1, 1]  # q, k and v, which share the training
    assert sum(faults) == 3
    assert "times not finite" in (root / "broken" / "report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": {"train": []}}, "layer.train"),
        ({"layer": {"train": ["codes"]}}, "layer.train.0"),
        ({"layer": {"held_out": 1}}, "layer.held_out"),
        ({"layer": {}, "target": {"of": "outputs"}}, "together would do it twice"),
        (
            {"layer": {"train": ["weights"]}, "hessian": {"refresh": "layer"}},
            "leaves nothing to train",
        ),
        ({"layer": {}, "calibration": {"sequences": 1}}, "at least 2 calibration.sequences"),
    ],
)
def test_recipes_that_make_no_sense(changes: JSON, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**{"layer": LAYER, **changes})
