"""The stage that fits codebooks and scales by least squares, on a quantized tiny model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.e2e.test_tune import files, launch
from vqllm import api
from vqllm.checkpoint.reader import Checkpoint
from vqllm.checkpoint.resume import tuned_writer as tuned
from vqllm.errors import NumericalError, RecipeError
from vqllm.recipes import Recipe, TuningRecipe, from_dict, tuning_from_dict
from vqllm.tuning import codebook_stage

KMEANS = {"type": "kmeans", "tile_rows": 1, "tile_cols": 2, "index_bits": 4}
CALIBRATION = {"sequences": 16, "length": 32}


def rounding(codec: object = KMEANS) -> Recipe:
    values = {
        "name": "rounded",
        "calibration": CALIBRATION,
        "transforms": [{"type": "hadamard", "side": "both"}],
        "codec": codec,
        "rounding": {"type": "nearest"},
    }
    return from_dict(values, "rounded")


def recipe(**stage: object) -> TuningRecipe:
    values = {
        "name": "fitted",
        "calibration": CALIBRATION,
        "stages": [{"type": "codebook", **stage}],
    }
    return tuning_from_dict(values, "fitted")


def quantize(source: Path, output: Path, text: Path, codec: object = KMEANS) -> Path:
    given = {"calibration": text, "evaluate": False, "device": "cpu"}
    api.quantize(source, output, recipe=rounding(codec), **given)
    return output


def run(rounded: Path, output: Path, text: Path, **options: object):
    given = {"recipe": recipe(), "calibration": text, "device": "cpu", "evaluate": False}
    summary = api.tune(rounded, output, **{**given, **options})
    assert summary is not None
    return summary


def losses(summary) -> tuple[float, float]:
    linears = summary.tuning[0]["linears"]
    before, after = (sum(own[key] for own in linears) / len(linears) for key in ("before", "after"))
    return before, after


@pytest.fixture(scope="module")
def rounded(root: Path, source: Path, text: Path) -> Path:
    return quantize(source, root / "rounded", text)


@pytest.fixture(scope="module")
def finished(root: Path, rounded: Path, text: Path):
    return run(rounded, root / "finished", text, evaluate=True)


def hessian(folder: Path, tokens: Tensor, name: str) -> Tensor:
    """E[x xᵀ] of a linear's inputs in a loaded model, damped as the stage does."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.set_attn_implementation("eager")
    seen: list[Tensor] = []
    linear = model.get_submodule(name)
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].float().flatten(0, -2)))
    with torch.no_grad():
        model(tokens)
    H_CC = seen[0].T @ seen[0]
    return H_CC + 0.01 * H_CC.diagonal().mean() * torch.eye(len(H_CC))


@pytest.mark.parametrize("layer", [0, 1])
def test_what_is_written_has_the_loss_that_is_told(
    finished, rounded, source, text, layer, monkeypatch, root
) -> None:
    seen = []
    stage = codebook_stage.Refit.__call__

    def keep(self, task):
        seen.append(task.sequences)
        return stage(self, task)

    monkeypatch.setattr(codebook_stage.Refit, "__call__", keep)
    run(rounded, root / f"seen-{layer}", text, recipe=recipe(steps=1))
    name = f"model.layers.{layer}.self_attn.q_proj"
    # Its inputs are behind the layers before it, which are fitted already.
    H_CC = hessian(finished.output, seen[0], name)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    W_RC = original.get_submodule(name).weight.detach()

    def loss(folder: Path) -> float:
        checkpoint = Checkpoint.open(folder)
        E_RC = W_RC - checkpoint.linears[name].dequantize(checkpoint.packed(name)).float()
        return float(((E_RC @ H_CC) * E_RC).sum() / ((W_RC @ H_CC) * W_RC).sum())

    (told,) = [own for own in finished.tuning[0]["linears"] if own["name"] == name]
    assert loss(rounded) == pytest.approx(told["before"], rel=0.02)
    assert loss(finished.output) == pytest.approx(told["after"], rel=0.02)
    assert told["after"] < 0.98 * told["before"]


def test_it_predicts_more_like_the_original(finished, source, rounded, text) -> None:
    given = {"baseline": source, "text": text, "num_windows": 8, "window_length": 64}
    before = api.evaluate(rounded, device="cpu", **given)["text"]["kl"]
    after = api.evaluate(finished.output, device="cpu", **given)["text"]["kl"]
    assert after < 0.95 * before


def test_the_report_and_the_checkpoint(finished, rounded) -> None:
    assert len(finished.tuning[0]["linears"]) == 14
    page = (finished.output / "report.md").read_text()
    assert "codebook, mean proxy loss" in page
    assert "## Tuning: codebook, proxy loss" in page
    one, other = Checkpoint.open(finished.output), Checkpoint.open(rounded)
    for name in one.linears:
        assert torch.equal(one.packed(name)["codes"], other.packed(name)["codes"])
        assert not torch.equal(one.packed(name)["codebook"], other.packed(name)["codebook"])


@pytest.mark.parametrize(
    ("codec", "train"),
    [
        (KMEANS, ["codebooks"]),
        (KMEANS, ["columns"]),
        ({"type": "e8p"}, ["rows"]),
        ({"type": "additive", "codebooks": 2, "index_bits": 4, "tile_cols": 4}, ["codebooks"]),
        (
            {"type": "trellis", "bits": 2, "code": "hybrid", "state_bits": 10, "tile_rows": 16},
            ["codebooks"],
        ),
        (
            {"type": "trellis", "bits": 2, "code": "gf2", "state_bits": 8, "tile_rows": 16},
            ["codebooks"],
        ),
        (
            {"type": "trellis", "bits": 2, "code": "bytes2", "state_bits": 8, "tile_rows": 16},
            ["rows", "columns"],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value["type"],
)
def test_every_kind_alone_lowers_the_loss_of_every_linear(
    tmp_path, source, text, codec, train
) -> None:
    folder = quantize(source, tmp_path / "rounded", text, codec)
    told = run(folder, tmp_path / "fitted", text, recipe=recipe(train=train)).tuning[0]["linears"]
    assert all(own["after"] <= own["before"] for own in told)
    assert sum(own["after"] < 0.99 * own["before"] for own in told) > 10


def test_a_second_fit_finds_nothing_more(finished, root, text) -> None:
    again = run(finished.output, root / "again", text)
    before, after = losses(again)
    assert before == pytest.approx(losses(finished)[1], rel=0.01)
    assert 0.98 * before < after <= before


def test_the_same_bytes_after_a_stop(finished, root, rounded, text, monkeypatch) -> None:
    keep = tuned.TunedWriter.save_record

    def stopping(self, name, told, tensors) -> None:
        keep(self, name, told, tensors)
        if name.startswith("stage"):
            raise KeyboardInterrupt

    monkeypatch.setattr(tuned.TunedWriter, "save_record", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(rounded, root / "stopped", text)
    monkeypatch.undo()
    fitted = []
    train = codebook_stage._Run._train

    def counted(self, index, parameters) -> None:
        fitted.append(index)
        train(self, index, parameters)

    monkeypatch.setattr(codebook_stage._Run, "_train", counted)
    run(rounded, root / "stopped", text, evaluate=True)
    assert fitted == [1]
    one, other = files(finished.output), files(root / "stopped")
    assert [name for name in one if one[name] != other[name]] == []


def test_it_goes_before_the_end_to_end_stage(root, rounded, text) -> None:
    stages = [
        {"type": "codebook"},
        {"type": "end_to_end", "steps": 4, "train": ["rows", "codebooks"]},
    ]
    both = tuning_from_dict({"name": "x", "calibration": CALIBRATION, "stages": stages}, "x")
    first, second = run(rounded, root / "both", text, recipe=both).tuning
    assert first["stage"] == "codebook"
    looks = [look["held_out_kl"] for look in second["history"]]
    assert min(looks) < looks[0]


def test_inputs_that_are_not_finite_are_refused(root, rounded, text, monkeypatch) -> None:
    hessians = codebook_stage._Run._hessians

    def broken(self, index):
        return {name: H_CC / 0 for name, H_CC in hessians(self, index).items()}

    monkeypatch.setattr(codebook_stage._Run, "_hessians", broken)
    with pytest.raises(NumericalError, match=r"layers\.0\..*: its inputs .* are not finite"):
        run(rounded, root / "broken", text)


def test_sharded_weights_cannot_be_read_whole() -> None:
    values = {"name": "x", "shard": True, "stages": [{"type": "codebook", "train": ["rows"]}]}
    with pytest.raises(RecipeError, match="shard: splits weights, which codebook reads whole"):
        tuning_from_dict(values, "x")


@pytest.mark.slow
def test_two_processes_fit_as_one_does(finished, root, rounded, text) -> None:
    file = root / "fitting.yaml"
    file.write_text(recipe().to_yaml())
    options = ("--recipe", file, "--calibration", text, "--device", "cpu", "--no-eval")
    result = launch(2, "-m", "vqllm", "tune", rounded, "--output", root / "two", *options)
    assert result.returncode == 0, result.stderr
    one, two = Checkpoint.open(finished.output), Checkpoint.open(root / "two")
    for name in one.linears:
        a, b = (own.linears[name].dequantize(own.packed(name)) for own in (one, two))
        assert (a - b).norm() < 0.01 * a.norm(), name
