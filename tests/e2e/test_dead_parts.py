"""Models with parts that the predictions do not depend on."""

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import vqllm
from tests.support.params import slow_but
from tests.support.tiny import TEXT, save_tiny

CHANGES = ("calibration.sequences=4", "calibration.length=32", "allocation.bits=3")
DEAD = {
    # What is set to zero, and the linears whose outputs then have no gradient.
    "one linear": (["layers.0.self_attn.o_proj"], ["q_proj", "k_proj", "v_proj"]),
    "an MLP": (["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"], ["gate_proj", "up_proj"]),
    "the end of an MLP": (["layers.1.mlp.down_proj"], ["gate_proj", "up_proj"]),
    "values": (["layers.0.self_attn.v_proj"], ["q_proj", "k_proj"]),
}


def quantize(source: Path, text: Path, output: Path, recipe: str) -> dict[str, float]:
    """Bits of codes a weight, of each linear."""
    vqllm.quantize(source, output, recipe=recipe, calibration=text, changes=CHANGES, evaluate=False)
    records = [json.loads(line) for line in (output / "report.jsonl").read_text().splitlines()]
    return {own["name"]: own["bits_codes"] / (own["rows"] * own["cols"]) for own in records}


@pytest.mark.parametrize("kind", slow_but(["one linear", "an MLP"], DEAD))
def test_linears_without_a_gradient_get_the_cheapest_codec_and_are_named(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    (tmp_path / "text.txt").write_text(TEXT * 60)
    zeros, dead = DEAD[kind]
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for name in zeros:
            model.get_submodule(f"model.{name}").weight.zero_()
    model.save_pretrained(source)
    with caplog.at_level(logging.WARNING, "vqllm"):
        bits = quantize(source, tmp_path / "text.txt", tmp_path / "out", "spread-2bit")
    layer = zeros[0].rpartition(".")[0].rpartition(".")[0]
    for name in dead:
        full = next(own for own in bits if own.endswith(name) and layer in own)
        # Tiles that a shape does not fill up make it larger: compared with the other layer's.
        alike = [value for own, value in bits.items() if own.endswith(name)]
        assert bits[full] == min(alike)
        assert full in caplog.text
        assert f"| {full} |" in (tmp_path / "out" / "report.md").read_text()
    assert max(bits.values()) > min(bits.values())
    logits = vqllm.load(tmp_path / "out")[0](torch.arange(8)[None]).logits
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("recipe", slow_but(["spread-2bit"], ["spread-2bit", "spread-small"]))
def test_a_text_of_one_repeated_token(tmp_path: Path, recipe: str) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    (tmp_path / "text.txt").write_text("z" * 5000)
    assert quantize(source, tmp_path / "text.txt", tmp_path / "out", recipe)
