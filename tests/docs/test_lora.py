"""docs/lora.md from the first line to the last, on a tiny quantized model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import vqllm
from tests.support.fake_checkpoint import fake_checkpoint
from tests.support.pages import ROOT, blocks, text_of

pytest.importorskip("peft", reason="the extra `peft` is not installed")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # asked by PEFT
@pytest.mark.filterwarnings("ignore::UserWarning")  # Trainer pins memory where there is no device
def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    fake.folder.rename(tmp_path / "demo-2bit")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks(text_of(ROOT / "docs" / "lora.md")):
        if block.kind == "python":
            exec(block.body, names)
        elif "dequantize" in block.body:
            assert block.body == "vqllm dequantize demo-2bit --output demo-dense\n"
            vqllm.dequantize("demo-2bit", "demo-dense")
    tokens = torch.arange(3, 40)[None]
    merged = AutoModelForCausalLM.from_pretrained("merged")
    with torch.no_grad():
        got, want = merged(tokens).logits, names["adapted"](tokens).logits
        with names["adapted"].disable_adapter():
            before = names["adapted"](tokens).logits
    assert float((got - want).norm() / want.norm()) < 1e-4
    assert float((before - want).norm() / want.norm()) > 0.1
    assert names["trainer"].state.log_history[-1]["train_loss"] < 5.9  # 6.2 at the first step
