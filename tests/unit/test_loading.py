"""Models and tokenizers that are incomplete or damaged are refused in one line, never filled up."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import vqllm
from tests.support.damaged import early_check, edit, edit_config
from tests.support.tiny import save_tiny, tiny_config
from vqllm.calibration.data import calibration_set as tokens
from vqllm.calibration.data.calibration_set import check_length
from vqllm.errors import CalibrationError, ModelError
from vqllm.hf import loading
from vqllm.quantization import loop as pipeline

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
UP = "model.layers.1.mlp.up_proj.weight"
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 36,
    "decoder_sparse_step": 1,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "source", tie_word_embeddings=False)


def both_ways(folder: Path, message: str) -> None:
    for load in (early_check, vqllm.load):
        with pytest.raises(ModelError, match=message):
            load(folder)


@pytest.mark.parametrize("name", [EMBEDDING, NORM, HEAD, UP])
def test_a_missing_tensor_is_named(folder: Path, name: str) -> None:
    edit(folder, lambda tensors: tensors.pop(name))
    both_ways(folder, f"lacks 1 of the tensors of a LlamaForCausalLM: {name}")


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=4)
    both_ways(folder, r"lacks 18 of .* and 15 more")


def test_what_is_tied_or_shared_is_not_missing(tmp_path: Path) -> None:
    tied = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    assert HEAD not in load_file(tied / "model.safetensors")
    early_check(tied)
    model, _ = vqllm.load(tied)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
def test_experts_that_are_stored_one_by_one_pass(tmp_path: Path, arch: str) -> None:
    early_check(save_tiny(tmp_path / arch, arch, **MOE, num_local_experts=4))


def test_another_shape_is_named(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({UP: torch.zeros(10, 10)}))
    both_ways(folder, rf"{UP} is \(10, 10\), not \(172, 64\)")


def test_more_layers_than_configured(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)
    both_ways(folder, r"weights of more layers .*model\.layers\.1\.")


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "x"},
        {"num_attention_heads": 7},
        {"hidden_act": "nope"},
        {"rope_parameters": {"rope_type": "nope"}},
        {"dtype": "nope"},
        {"model_type": "clip"},
        {"model_type": "bert"},
        {"num_hidden_layers": 0},
    ],
    ids=str,
)
def test_a_configuration_that_is_not_understood(folder: Path, values: dict[str, Any]) -> None:
    edit_config(folder, **values)
    both_ways(folder, str(folder))


def test_a_quantized_folder_without_its_configuration(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox counts 12 jars of ink. " * 400)
    changes = ("calibration.sequences=4", "calibration.length=32")
    vqllm.quantize(
        folder,
        tmp_path / "q",
        recipe="rtn-4bit",
        calibration=text,
        changes=changes,
        evaluate=False,
        device="cpu",
    )
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"Put back the config\.json"):
        vqllm.load(tmp_path / "q")


def test_a_model_without_anything_to_quantize_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "calibration_sequences", lambda *_: pytest.fail("too late"))
    source = save_tiny(tmp_path / "source", "llama")
    changes = ("skip=['.*']",)
    with pytest.raises(ModelError, match="nothing to quantize: 16 x left out by"):
        vqllm.quantize(source, tmp_path / "q", recipe="rtn-4bit", changes=changes, device="cpu")
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("contents", ["{x", "{}", None])
def test_a_tokenizer_that_cannot_be_loaded(folder: Path, contents: str | None) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    if contents is not None:
        (folder / "tokenizer.json").write_text(contents)
        with pytest.raises(ModelError, match="has no tokenizer"):
            vqllm.load(folder)
    with pytest.raises(ModelError, match="has no tokenizer"):
        loading.load_tokenizer(folder)


def test_a_tokenizer_with_code_of_its_own(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values |= {"auto_map": {"AutoTokenizer": ["own.T", None]}, "tokenizer_class": "T"}
    path.write_text(json.dumps(values))
    (folder / "own.py").write_text("raise SystemExit('executed')")
    with pytest.raises(ModelError, match="--trust-remote-code"):
        loading.load_tokenizer(folder)


def test_experts_of_any_width_run_on_a_cpu(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "moe", "qwen3_moe", **MOE)
    model = loading.load_model(source, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert model(torch.arange(10)[None]).logits.isfinite().all()


def test_positions_end_or_go_on(caplog: pytest.LogCaptureFixture) -> None:
    for arch in ("opt", "llama", "gpt_neox", "gemma3_text"):
        check_length(tiny_config(arch), 256)
    warnings = [record for record in caplog.records if record.name == tokens.__name__]
    assert not warnings
    with pytest.raises(CalibrationError, match="300 tokens are longer than the 256"):
        check_length(tiny_config("opt"), 300)
    for arch in ("llama", "gpt_neox", "gemma3_text"):
        check_length(tiny_config(arch), 300)
    warnings = [record for record in caplog.records if record.name == tokens.__name__]
    assert len(warnings) == 3


def test_texts_are_not_cut_longer_than_the_positions(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "opt")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox counts 12 jars of ink. " * 400)
    with pytest.raises(CalibrationError, match="300 tokens are longer than the 256"):
        tokens.calibration_sequences(
            source, (str(text),), 4, 300, 0, torch.device("cpu"), trust_remote_code=False
        )
