"""Plans against the runs that they are of."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from tests.support.quantized import recipe
from tests.support.tiny import save_tiny
from vqllm import api
from vqllm.cli import app

TRELLIS = {"type": "trellis", "bits": 3, "state_bits": 8, "tile_rows": 16, "code": "gf2"}
BUDGET = {
    "codec": TRELLIS,
    "allocation": {"bits": 3, "codecs": [{"bits": 2}, {"bits": 3}, {"bits": 4}]},
}
ENDS = {
    "embeddings": {"codec": TRELLIS, "rounding": {"type": "nearest"}},
    "head": {"codec": TRELLIS, "rounding": {"type": "ldlq"}},
}
TUNED = {
    "layer": {"steps": 1, "batch": 2},
    "tune": {
        "calibration": {"sequences": 8, "length": 16},
        "stages": [{"type": "end_to_end", "steps": 1, "train": ["rows", "columns"]}],
    },
}


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("qwen2", {}),
        ("qwen2", ENDS),
        ("llama", BUDGET),
        ("llama", {"codec": TRELLIS, "skip": ["down_proj"]}),
        ("llama", TUNED),
    ],
)
def test_the_planned_size_is_that_of_the_files(
    tmp_path: Path, text: Path, arch: str, changes: dict[str, Any]
) -> None:
    source = save_tiny(tmp_path / "source", arch)
    own = recipe(**changes)
    given: dict[str, Any] = {"recipe": own, "calibration": text, "device": "cpu"}
    planned = api.plan(source, measure=False, **given)
    summary = api.quantize(source, tmp_path / "out", evaluate=False, **given)
    assert planned.bytes_before == pytest.approx(summary.bytes_before, rel=0.01)
    assert planned.parameters == summary.parameters
    assert planned.not_quantized == summary.not_quantized
    files = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    if "allocation" in changes:
        # Which linear gets which codec is a guess; the budget leaves less than the largest step.
        assert planned.bytes_after == pytest.approx(summary.bytes_after, rel=0.03)
        return
    assert planned.bytes_after == summary.bytes_after
    assert planned.bits_per_weight == summary.bits_per_weight
    # A tuned checkpoint is written by other code, whose headers are a few bytes shorter.
    assert planned.file_bytes == pytest.approx(files, abs=64 if changes is TUNED else 0)


def test_a_dry_run_is_the_plan_and_writes_nothing(tmp_path: Path, text: Path) -> None:
    source = save_tiny(tmp_path / "source")
    out = tmp_path / "out"
    few = ("--set", "calibration.sequences=4", "--set", "calibration.length=32")
    given = ("quantize", str(source), "--output", str(out), "--recipe", "gptq-4bit")
    done = CliRunner().invoke(app, [*given, "--calibration", str(text), *few, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert not out.exists()
    for label in ("size", "expected KL", "time", "peak memory", "disk", "modules not quantized"):
        assert label in done.output, label


def test_a_config_alone_has_the_size_of_the_model_with_its_weights(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    alone = tmp_path / "alone"
    alone.mkdir()
    config = json.loads((source / "config.json").read_text())
    (alone / "config.json").write_text(json.dumps(config))
    planned, other = (api.plan(path, recipe=recipe(), measure=False) for path in (alone, source))
    assert planned.bytes_after == other.bytes_after
    assert planned.bytes_before == other.bytes_before
    assert "nothing was measured" in planned.notes[0]


def test_a_plan_of_405_billion_weights_needs_none_of_them(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=128256,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    planned = api.plan(tmp_path, bits=2)
    assert planned.parameters.model == pytest.approx(405.8e9, rel=1e-3)
    assert planned.bits_per_weight["all of a quantized linear"] == pytest.approx(2, rel=1e-3)
    assert planned.bytes_after == pytest.approx(2 * 401.6e9 / 8 + 2 * 4.2e9, rel=0.01)
