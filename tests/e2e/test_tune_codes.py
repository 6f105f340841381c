"""Stages that move codebooks and codes of a quantized tiny model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.params import slow
from vqllm import api
from vqllm.checkpoint.reader import Checkpoint
from vqllm.checkpoint.resume import tuned_writer as tuned
from vqllm.errors import CheckpointError
from vqllm.recipes import from_dict, tuning_from_dict

CODECS = {
    "kmeans": {"type": "kmeans", "index_bits": 6, "tile_cols": 4},
    "uniform": {"type": "uniform", "bits": 2, "group": 16},
    "residual": {"type": "residual", "stages": [{"type": "d4"}, {"type": "d4"}]},
    "table": {"type": "trellis", "code": "table", "bits": 2, "state_bits": 8},
}
STAGES = {
    "codebooks": {"type": "end_to_end", "train": ["codebooks"], "steps": 20, "codebook_rate": 0.01},
    "pv": {"type": "pv", "steps": 24, "every": 2, "rate": 0.01, "share": 0.5},
    "straight_through": {
        "type": "straight_through",
        "steps": 12,
        "every": 2,
        "rate": 0.01,
        "weight_rate": 0.3,
    },
}


def quantized(source: Path, text: Path, name: str, **keys: object) -> Path:
    recipe = {
        "name": name,
        "calibration": {"sequences": 6, "length": 32},
        "transforms": [{"type": "hadamard", "side": "both"}],
        "codec": CODECS.get(name),
        "rounding": {"type": "nearest"},
        **keys,
    }
    recipe = from_dict({k: v for k, v in recipe.items() if v is not None}, name)
    api.quantize(
        source, source.parent / name, recipe=recipe, calibration=text, evaluate=False, device="cpu"
    )
    return source.parent / name


@pytest.fixture(scope="module", params=CODECS)
def rounded(request, source: Path, text: Path) -> Path:
    return quantized(source, text, request.param)


def run(folder: Path, output: Path, text: Path, *stages: str):
    recipe = tuning_from_dict(
        {
            "name": "codes",
            "calibration": {"sequences": 40, "length": 32},
            "stages": [{"batch": 4, **STAGES[name]} for name in stages],
        },
        "codes",
    )
    return api.tune(folder, output, recipe=recipe, calibration=text, device="cpu")


@pytest.mark.parametrize("stage", [slow("codebooks"), "pv"])
def test_it_predicts_more_like_the_original(root, text, rounded, stage) -> None:
    told = run(rounded, root / f"{rounded.name}-{stage}", text, stage)
    history = told.tuning[0]["history"]
    before, best = history[0]["held_out_kl"], min(look["held_out_kl"] for look in history)
    # Two scales a matrix are all that d4 + d4 can learn.
    assert best < (1 if (rounded.name, stage) == ("residual", "codebooks") else 0.98) * before
    # What was written decodes to what was measured.
    assert told.evaluation["kl"] == pytest.approx(best, rel=0.05)
    one, other = Checkpoint.open(rounded), Checkpoint.open(told.output)
    changed = codes_changed(one, other)
    assert (changed > 0) == (stage == "pv")
    if stage == "codebooks":
        assert one.linears == other.linears  # the same sizes
        assert (
            AutoModelForCausalLM.from_pretrained(told.output)(torch.arange(8)[None])
            .logits.isfinite()
            .all()
        )


def codes_changed(one: Checkpoint, other: Checkpoint) -> int:
    """Linears with other codes."""
    found = 0
    for name, spec in one.linears.items():
        codes = [key for key, tensor in spec.format.layout(spec.rows, spec.cols).items()]
        codes = [key for key in codes if key.endswith("codes")]
        assert codes
        before, after = one.packed(name), other.packed(name)
        found += any(not torch.equal(before[key], after[key]) for key in codes)
    return found


@pytest.mark.parametrize("stage", ["pv", "straight_through"])
def test_an_interrupted_run_ends_as_a_straight_one(root, source, text, stage, monkeypatch) -> None:
    folder = root / "kmeans"
    if not folder.exists():
        quantized(source, text, "kmeans")
    straight = run(folder, root / f"straight-{stage}", text, stage)
    assert codes_changed(Checkpoint.open(folder), Checkpoint.open(straight.output)) > 0
    keep, calls = tuned.TunedWriter.save_record, []

    def stopping(self, name, told, tensors) -> None:
        keep(self, name, told, tensors)
        if name.startswith("stage"):
            calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(tuned.TunedWriter, "save_record", stopping)
    output = root / f"stopped-{stage}"
    with pytest.raises(KeyboardInterrupt):
        run(folder, output, text, stage)
    monkeypatch.undo()
    told = run(folder, output, text, stage)
    assert told.tuning == straight.tuning
    for path in straight.output.glob("*.safetensors"):
        assert path.read_bytes() == (output / path.name).read_bytes()


def test_activations_computed_again_move_the_same_codes(root, source, text, monkeypatch) -> None:
    folder = root / "kmeans"
    if not folder.exists():
        quantized(source, text, "kmeans")
    kept = run(folder, root / "activations-kept", text, "pv")
    monkeypatch.setitem(STAGES, "pv", {**STAGES["pv"], "checkpointing": True})
    again = run(folder, root / "activations-again", text, "pv")
    assert again.tuning == kept.tuning
    for path in kept.output.glob("*.safetensors"):
        assert path.read_bytes() == (again.output / path.name).read_bytes()


def test_every_linear_has_the_codec_that_it_was_allocated(root, source, text) -> None:
    allocation = {"bits": 2.6, "codecs": [{"bits": 2}, {"bits": 3}]}
    codec = {"type": "trellis", "bits": 2, "state_bits": 8, "code": "mul1"}
    folder = quantized(source, text, "allocated", codec=codec, allocation=allocation)
    assert len({spec.format for spec in Checkpoint.open(folder).linears.values()}) == 2
    told = run(folder, root / "allocated-tuned", text, "pv")
    assert told.tuning[0]["codes_moved"] > 0
    assert "## Codes that moved, in " in (told.output / "report.md").read_text()


def test_a_checkpoint_that_does_not_say_how_it_was_coded(root, source, text) -> None:
    if not (root / "kmeans").exists():
        quantized(source, text, "kmeans")
    folder = shutil.copytree(root / "kmeans", root / "unknown")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["recipe"]["codec"]["index_bits"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="which no codec of its recipe writes"):
        run(folder, root / "never", text, "pv")
    del config["quantization_config"]["recipe"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"has no recipe\. Leave out `codebooks`"):
        run(folder, root / "never-either", text, "pv")
