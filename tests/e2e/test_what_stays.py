"""What a run leaves as it is, and what it says of that."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.tiny import save_tiny
from vqllm import api
from vqllm.checkpoint.reader import Checkpoint
from vqllm.errors import ModelError
from vqllm.recipes import Recipe, from_dict
from vqllm.report.summary import Summary

EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}


def recipe(**changes: object) -> Recipe:
    values = {
        "name": "test",
        "calibration": {"source": ["self"], "sequences": 2, "length": 16},
        "codec": {"type": "e8p"},
        "rounding": {"type": "nearest"},
    }
    return from_dict({**values, **changes}, "test recipe")


def run(source: Path, output: Path, **changes: object) -> Summary:
    return api.quantize(source, output, recipe=recipe(**changes), evaluate=False)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose shared expert has a gate."""
    return save_tiny(tmp_path_factory.mktemp("mixture"), "qwen2_moe", **EXPERTS)


def test_gates_stay_and_the_report_says_why(mixture: Path, tmp_path: Path) -> None:
    summary = run(mixture, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    page = (tmp_path / "out" / "report.md").read_text()
    before = load_file(mixture / "model.safetensors")
    for index in range(2):
        name = f"model.layers.{index}.mlp.shared_expert_gate"
        reason = summary.not_quantized[name]
        assert reason == config["not_quantized"][name] == "a linear of few rows (1 x 64)"
        assert f"| {name} | {reason} |" in page
        shard = load_file(tmp_path / "out" / f"model-0000{index + 1}-of-00003.safetensors")
        assert shard[f"{name}.weight"].equal(before[f"{name}.weight"])
    assert "skip_kinds" not in config["recipe"]


def test_a_recipe_quantizes_gates_too(mixture: Path, tmp_path: Path) -> None:
    summary = run(mixture, tmp_path / "out", skip_kinds=[])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.mlp.shared_expert_gate" in config["modules"]
    assert not any("few rows" in reason for reason in summary.not_quantized.values())
    assert config["recipe"]["skip_kinds"] == []


KMEANS = {"type": "kmeans", "tile_rows": 1, "tile_cols": 4, "index_bits": 8}


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In 16 bits, with attention that is smaller than a table of 256 x 4 values."""
    sizes: dict[str, Any] = {"hidden_size": 37, "intermediate_size": 530, "num_hidden_layers": 1}
    folder = tmp_path_factory.mktemp("thin")
    return save_tiny(folder, dtype=torch.bfloat16, **sizes)


def test_a_matrix_that_would_be_larger_stays(
    thin: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    summary = run(thin, tmp_path / "out", codec=KMEANS)
    name = "model.layers.0.self_attn.k_proj"
    reason = "packed it would not be smaller (16 x 37: 29.8 bits a weight, 16 as it is)"
    assert summary.not_quantized[name] == reason
    assert f"| {name} | {reason} |" in (tmp_path / "out" / "report.md").read_text()
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert {n.rpartition(".")[2] for n in checkpoint.linears} == {
        *("gate_proj", "up_proj", "down_proj")
    }
    said = [text for text in caplog.messages if "would not be smaller" in text]
    assert len(said) == 1
    assert said[0].startswith("4 linears of ")
    assert "self_attn.q_proj (16 x 37: 29.8 bits a weight, 16 as it is)" in said[0]


def test_a_model_of_which_nothing_would_be_smaller_is_refused(thin: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="7 x packed it would not be smaller"):
        run(thin, tmp_path / "out", codec={**KMEANS, "index_bits": 14})
    assert not (tmp_path / "out").exists()


def test_a_budget_does_not_buy_what_would_be_larger(thin: Path, tmp_path: Path) -> None:
    fine = {**KMEANS, "tile_cols": 2}  # 17.8 bits a weight for 16 x 37
    budget = {"bits": 12.0, "codecs": [{"type": "e8p"}, fine]}
    run(thin, tmp_path / "out", codec=fine, allocation=budget)
    checkpoint = Checkpoint.open(tmp_path / "out")
    formats = {
        name.rpartition(".")[2]: s.format.format_id for name, s in checkpoint.linears.items()
    }
    assert len(formats) == 7
    assert formats["k_proj"] == formats["o_proj"] == "e8p-v1"
    assert formats["gate_proj"] == formats["down_proj"] == "lut-v1"
    for name, spec in checkpoint.linears.items():
        assert checkpoint.bits(name).total < 16 * spec.rows * spec.cols


WARNING = "less than half of the decoder layers"


def test_a_run_says_how_much_is_quantized(
    mixture: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    summary = run(mixture, tmp_path / "out", skip=["mlp"])
    model = AutoModelForCausalLM.from_pretrained(mixture)
    num_layers = sum(p.numel() for p in model.model.layers.parameters())
    num_attention = sum(
        p.numel() for n, p in model.named_parameters() if "self_attn" in n and p.dim() == 2
    )
    counts = summary.parameters
    assert counts is not None
    assert (counts.layers, counts.layers_quantized) == (num_layers, num_attention)
    assert counts.model == sum(p.numel() for p in model.parameters())
    assert counts.model_quantized == num_attention
    assert counts.of_layers < 0.5
    # Before the run begins, in the closing table, and on both pages.
    share = f"{100 * num_attention / num_layers:.2f} % of the parameters in the decoder layers"
    before = [text for text in caplog.messages if text.startswith(f"only {share} of {mixture}")]
    assert len(before) == 1
    assert "x left out by the recipe's skip pattern 'mlp'" in before[0]
    rows = dict(summary.rows())
    assert rows["quantized"].startswith(share)
    assert rows["warning"].startswith(WARNING)
    for page in ("report.md", "README.md"):
        text = (tmp_path / "out" / page).read_text()
        assert share in text
        assert WARNING in text
        assert f"| modules not quantized | {rows['modules not quantized']} |" in text


def test_no_warning_where_most_is_quantized(
    thin: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    summary = run(thin, tmp_path / "out")
    assert "quantized" in dict(summary.rows())
    assert "warning" not in dict(summary.rows())
    assert not any(text.startswith("only") for text in caplog.messages)
