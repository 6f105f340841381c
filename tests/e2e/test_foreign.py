"""Checkpoints of other tools go wherever an ordinary model goes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import vqllm
from tests.support.foreign import CONFIGS, HELD, write_coded
from tests.support.quantized import quantize
from vqllm.checkpoint.convert import convert_checkpoint
from vqllm.checkpoint.reader import Checkpoint
from vqllm.cli import app
from vqllm.errors import CheckpointError, ModelError
from vqllm.evaluation.resident import resident_bytes
from vqllm.models.load import load

METHODS = list(CONFIGS)
Coded = tuple[Path, dict[str, Tensor]]


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Coded]:
    folders = {method: tmp_path_factory.mktemp(method) / "model" for method in METHODS}
    return {method: (folder, write_coded(folder, method)) for method, folder in folders.items()}


@pytest.mark.parametrize("method", METHODS)
def test_it_loads_with_the_dense_weights(coded: dict[str, Coded], method: str) -> None:
    folder, dense = coded[method]
    model, tokenizer = load(folder)
    assert tokenizer is not None
    parameters = dict(model.named_parameters())
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(model.config, "quip_params")
    for name, weight in dense.items():
        assert torch.equal(parameters[name], weight.half())


@pytest.mark.parametrize("method", METHODS)
def test_dequantize_writes_an_ordinary_model(
    coded: dict[str, Coded], method: str, tmp_path: Path
) -> None:
    folder, dense = coded[method]
    vqllm.dequantize(folder, tmp_path / "dense", "float32")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"quantization_config", "quip_params"} & set(config)
    stored = load_file(next((tmp_path / "dense").glob("*.safetensors")))
    for name, weight in dense.items():
        assert torch.equal(stored[name], weight)
    model, _ = load(tmp_path / "dense")
    own, _ = load(folder, dtype="float32")
    tokens = torch.arange(12)[None] % model.config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, own(tokens).logits, rtol=2e-2, atol=2e-2)


def test_it_is_quantized_again_from_the_dense_weights(
    coded: dict[str, Coded], tmp_path: Path
) -> None:
    folder, _ = coded["gptq"]
    vqllm.dequantize(folder, tmp_path / "dense")
    quantize(folder, tmp_path / "a", calibration="self")
    quantize(tmp_path / "dense", tmp_path / "b", calibration="self")
    for shard in sorted((tmp_path / "a").glob("*.safetensors")):
        own, other = load_file(shard), load_file(tmp_path / "b" / shard.name)
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], other[name]) for name in own)
    Checkpoint.open(tmp_path / "a")


@pytest.mark.parametrize("method", METHODS)
def test_inspect_counts_its_bits(coded: dict[str, Coded], method: str) -> None:
    folder, dense = coded[method]
    found = vqllm.inspect(folder)
    assert {f"{own['name']}.weight" for own in found["linears"]} == set(dense)
    bits = 2 if method in ("aqlm", "quip#", "qtip") else 4
    assert found["bits_per_weight"]["codes only"] == pytest.approx(bits)
    stored = load_file(folder / "model.safetensors")
    assert found["num_bytes"] == sum(tensor.nbytes for tensor in stored.values())
    shown = CliRunner().invoke(app, ["inspect", str(folder)])
    assert shown.exit_code == 0
    assert f"quant_method: {method}" in shown.stdout


def test_eval_compares_with_it(coded: dict[str, Coded], tmp_path: Path) -> None:
    folder, _ = coded["awq"]
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    options = ["--text", str(text), "--window-length", "64", "--windows", "2", "--device", "cpu"]
    shown = CliRunner().invoke(app, ["eval", str(folder), "--baseline", str(folder), *options])
    assert shown.exit_code == 0, shown.output
    assert "100" in shown.stdout  # per cent of the first choices are the same


def test_a_damaged_one_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_coded(folder, "gptq")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.qweight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for use in (load, vqllm.inspect, lambda path: vqllm.dequantize(path, tmp_path / "out")):
        with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj has .*, but no qweight"):
            use(folder)
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    write_coded(tmp_path / "model", "gptq", checkpoint_format="gptq_v2")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["checkpoint_format"] = "bitblas"
    path.write_text(json.dumps(config))
    shown = CliRunner().invoke(app, ["dequantize", str(tmp_path / "model"), "--output", "x"])
    assert isinstance(shown.exception, ModelError)
    assert "checkpoint_format is 'bitblas'" in str(shown.exception)


@pytest.mark.parametrize("method", HELD)
def test_convert_keeps_every_weight(coded: dict[str, Coded], method: str, tmp_path: Path) -> None:
    folder, dense = coded[method]
    output = tmp_path / "own"
    shown = CliRunner().invoke(app, ["convert", str(folder), "--output", str(output)])
    assert shown.exit_code == 0, shown.output
    checkpoint = Checkpoint.open(output)
    assert {f"{name}.weight" for name in checkpoint.linears} == set(dense)
    for name, weight in dense.items():
        assert torch.equal(checkpoint.dense(name.removesuffix(".weight")), weight)
    model, _ = load(output, dtype="float32")
    own, _ = load(folder, dtype="float32")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, own(tokens).logits, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("method", "reason"), [("quip#", "one Hadamard transform"), ("qtip", "no format of ours")]
)
def test_what_no_format_of_ours_holds_is_refused(
    coded: dict[str, Coded], method: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        convert_checkpoint(coded[method][0], tmp_path / "own")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("method", "kind"), [("gptq", "mixtral"), ("awq", "qwen3_moe")])
def test_experts_that_are_stored_one_by_one(method: str, kind: str, tmp_path: Path) -> None:
    folder, output = tmp_path / "model", tmp_path / "own"
    dense = write_coded(folder, method, kind)
    # One expert is not coded: with the others it becomes a linear of its own.
    tensors = load_file(folder / "model.safetensors")
    left = next(name for name in dense if "layers.1" in name and "experts.2" in name)
    prefix = left.removesuffix("weight")
    tensors = {key: value for key, value in tensors.items() if not key.startswith(prefix)}
    save_file({**tensors, left: dense.pop(left).half()}, folder / "model.safetensors")
    convert_checkpoint(folder, output)
    checkpoint = Checkpoint.open(output)
    assert len(checkpoint.linears) == len(dense)
    model, _ = load(output, dtype="float32")
    own, _ = load(folder, dtype="float32")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, own(tokens).logits, rtol=2e-2, atol=2e-2)
    vqllm.dequantize(folder, tmp_path / "dense", "float32")
    stored = load_file(next((tmp_path / "dense").glob("*.safetensors")))
    for name, weight in dense.items():
        assert torch.equal(stored[name], weight)


def test_a_head_of_its_own_is_used_though_config_json_says_it_is_the_embedding(
    coded: dict[str, Coded], tmp_path: Path
) -> None:
    folder, dense = coded["exl3"]
    tied = tmp_path / "model"
    shutil.copytree(folder, tied)
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    convert_checkpoint(tied, tmp_path / "own")
    for path in (tied, tmp_path / "own"):
        model, _ = load(path, dtype="float32")
        head = model.get_output_embeddings()
        assert head is not None
        torch.testing.assert_close(head.weight, dense["lm_head.weight"], rtol=1e-3, atol=1e-4)


def test_memory_with_it_is_measured(coded: dict[str, Coded]) -> None:
    found = resident_bytes(coded["gptq"][0])
    assert found is None or found["loaded"] > found["imports"] > 0


def test_what_cannot_be_converted_is_refused_with_advice(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_coded(folder, "gptq", desc_act=True)
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.g_idx"
    tensors[key] = tensors[key].flip(0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj, its columns .*vqllm dequantize"):
        convert_checkpoint(folder, tmp_path / "own")
    assert not (tmp_path / "own").exists()
    write_coded(tmp_path / "again", "gptq")
    vqllm.dequantize(tmp_path / "again", tmp_path / "dense")
    with pytest.raises(CheckpointError, match="is no checkpoint of another tool"):
        convert_checkpoint(tmp_path / "dense", tmp_path / "own")
