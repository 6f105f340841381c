"""Timing a model beside its original."""

import json

import pytest
from typer.testing import CliRunner

from tests.support.tiny import save_tiny
from vqllm import api, cli
from vqllm.errors import EvaluationError
from vqllm.evaluation import speed
from vqllm.recipes import from_dict
from vqllm.runtime import set_weight_cache
from vqllm_kernels import dispatch
from vqllm_kernels.cpu import kernels as packed
from vqllm_kernels.lut import cpu as lookup

RECIPE = from_dict(
    {
        "version": 1,
        "name": "small-tables",
        "codec": {"type": "kmeans", "tile_rows": 1, "tile_cols": 4, "index_bits": 4},
        "rounding": {"type": "nearest"},
        "calibration": {"source": ["self"], "sequences": 8, "length": 16},
    },
    "small-tables",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An original and its quantized model."""
    root = tmp_path_factory.mktemp("speed")
    source = save_tiny(root / "source")
    api.quantize(source, root / "quantized", recipe=RECIPE, evaluate=False, device="cpu")
    return source, root / "quantized"


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    # As on a processor where codebooks are not multiplied as they are stored.
    monkeypatch.setattr(packed, "missing", lambda wide_only: "no such instructions")
    monkeypatch.setattr(lookup, "fewest_weights", lambda cols: 0)
    dispatch.forget()
    yield
    dispatch.forget()
    set_weight_cache("auto")


SHORT = {"prompt_tokens": 8, "new_tokens": 3, "rounds": 2, "device": "cpu"}


def test_a_model_beside_its_original(folders):
    source, quantized = folders
    results = api.bench(quantized, baseline=source, batch=2, prompts=(16,), **SHORT)
    assert results["models"].keys() == {"model", "original"}
    for figures in results["models"].values():
        assert figures["prefill_tokens_per_s"] > 0
        assert figures["decode_tokens_per_s"] > 0
        assert min(figures["spread"].values()) >= 1
        assert figures["prompt_tokens_per_s"].keys() == {"16"}
    assert results["ratios"].keys() == {"prefill", "decode"}
    model, original = (results["models"][name]["weight_bytes"] for name in ("model", "original"))
    assert model["stored"] < original["stored"]
    assert original["kept"] == 0
    json.dumps(results)


def test_every_linear_has_a_row(folders):
    results = api.bench(folders[1], **SHORT)
    model, _ = api.load(folders[1])
    quantized = [m for m in model.modules() if type(m).__name__ == "VQLinear"]
    assert sum(row["number"] for row in results["linears"]) == len(quantized)
    assert {row["decode"] for row in results["linears"]} == {"lookup"}
    assert {row["prefill"] for row in results["linears"]} == {"dense weights, kept"}
    assert results["ratios"] == {}
    codes = sum(-(-m.in_features // 4) * m.out_features for m in quantized)
    dense = sum(2 * m.in_features * m.out_features for m in quantized)
    assert results["models"]["model"]["weight_bytes"]["kept"] == codes + dense


def test_nothing_is_kept_that_was_not_asked_for(folders):
    set_weight_cache("off")
    results = api.bench(folders[1], batch=3, **SHORT)
    assert {row["decode"] for row in results["linears"]} == {"lookup"}
    assert {row["prefill"] for row in results["linears"]} == {"reference"}


def test_an_ordinary_model_is_timed_too(folders):
    assert api.bench(folders[0], **SHORT)["linears"] == []


@pytest.mark.parametrize("name", ["batch", "prompt_tokens", "new_tokens", "rounds"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(EvaluationError, match=f"{name} is 0; allowed are numbers from 1 on"):
        speed.Load(**{name: 0})


def test_more_tokens_than_a_model_takes_are_refused(tmp_path):
    source = save_tiny(tmp_path / "opt", "opt")
    with pytest.raises(EvaluationError, match="tokens of prompt and continuation; the model takes"):
        api.bench(source, prompt_tokens=10_000, device="cpu")


def test_the_command_prints_and_writes(folders, tmp_path):
    file = tmp_path / "speed.json"
    arguments = ["bench", str(folders[1]), "--baseline", str(folders[0]), "--json", str(file)]
    arguments += ["--prompt-tokens", "8", "--new-tokens", "2", "--rounds", "1", "--device", "cpu"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "model: decoding" in result.output
    assert "decode: model / original" in result.output
    assert "lookup" in result.output
    found = json.loads(file.read_text())
    assert found["load"]["new_tokens"] == 2
    for figures in found["models"].values():
        assert list(figures["prompt_tokens_per_s"]) == ["256", "512"]
        resident = figures["resident_bytes"]
        assert 0 < resident["imports"] < resident["loaded"]
        assert resident["generated"] > resident["imports"]
    assert "model: resident memory" in result.output
