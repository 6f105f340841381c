"""What a run leaves as it is, and what it says of that."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.tiny import save_tiny
from vqllm import api
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
