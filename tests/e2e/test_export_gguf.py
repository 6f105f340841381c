"""A model as a GGUF file: which tensors are coded, the order of rows, what bad input gets."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from tests.support.foreign import write_coded
from tests.support.tiny import TEXT, save_tiny
from vqllm import api
from vqllm.errors import CheckpointError, ModelError, RecipeError
from vqllm.export import container
from vqllm.export.tensors import Place, row_order
from vqllm.models.load import load

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def reordered(W_RC: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of q or k as a Llama's GGUF file has them."""
    halves = W_RC.reshape(heads, 2, len(W_RC) // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(W_RC.shape)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "model"
    save_tiny(folder, "llama", intermediate_size=256)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(f"{i}. {TEXT}" for i in range(300)))
    return file


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """In place of llama.cpp's converter, one of a Llama without a tokenizer."""
    file = tmp_path / "convert_hf_to_gguf.py"
    file.write_text("")

    def convert(converter: Path, folder: Path, name: str, output: Path) -> None:
        weights = load(folder, dtype=torch.float32)[0].state_dict()
        writer = gguf.GGUFWriter(output, "llama")
        writer.add_block_count(2)
        writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
        writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
        writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
        for layer in range(2):
            for ours, theirs in NAMES.items():
                W_RC = weights[f"model.layers.{layer}.{ours}.weight"].numpy()
                heads = {"attn_q": 4, "attn_k": 2}.get(theirs)
                W_RC = W_RC if heads is None else reordered(W_RC, heads)
                writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(W_RC))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    monkeypatch.setattr("vqllm.export.container.convert", convert)
    return file


def test_a_file_holds_the_model(
    model: Path, text: Path, converter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out.gguf"
    caplog.set_level("INFO", "vqllm")
    api.export_gguf(model, output, type="q3_k", calibration=text, sequences=8, converter=converter)
    assert "12 x Q4_0, 2 x Q3_K" in caplog.text
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    reader: Any = gguf.GGUFReader(output)
    assert reader.get_field("tokenizer.ggml.tokens").contents() == ["a", "b"]
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_Q3_K_S
    tensors = {own.name: own for own in reader.tensors}
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "Q3_K"
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    weights = load(model, dtype=torch.float32)[0].state_dict()
    for ours, theirs in NAMES.items():
        own = tensors[f"blk.1.{theirs}.weight"]
        W_RC = weights[f"model.layers.1.{ours}.weight"].numpy()
        heads = {"attn_q": 4, "attn_k": 2}.get(theirs)
        W_RC = W_RC if heads is None else reordered(W_RC, heads)
        error = gguf.dequantize(own.data, own.tensor_type) - W_RC
        assert np.square(error).mean() < 0.1 * np.square(W_RC).mean(), theirs


def test_weights_that_another_tool_coded_are_converted_dense(
    text: Path, converter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, convert = tmp_path / "awq", container.convert
    write_coded(folder, "awq")

    def of_dense(converter: Path, folder: Path, name: str, output: Path) -> None:
        assert "quantization_config" not in (folder / "config.json").read_text()
        assert name.endswith("awq")
        convert(converter, folder, name, output)

    monkeypatch.setattr(container, "convert", of_dense)
    options = {"calibration": text, "sequences": 4, "converter": converter}
    api.export_gguf(folder, tmp_path / "out.gguf", type="Q8_0", **options)
    reader: Any = gguf.GGUFReader(tmp_path / "out.gguf")
    types = {own.name: own.tensor_type.name for own in reader.tensors}
    assert types["blk.1.ffn_up.weight"] == "Q8_0"
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out.gguf"]


def test_rows_of_another_matrix_are_not_taken(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("a.weight", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = gguf.GGUFReader(tmp_path / "a.gguf").tensors[0]
    W_RC = torch.arange(64).reshape(2, 32).half()
    order_R = row_order(Place(tensor), W_RC.flip(0))
    assert order_R is not None
    assert order_R.tolist() == [1, 0]
    assert row_order(Place(tensor), W_RC + 1) is None


def test_what_bad_input_gets(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="allowed are Q4_0"):
        api.export_gguf(model, tmp_path / "a.gguf", type="Q9_K")
    with pytest.raises(CheckpointError, match=r"ends in \.gguf"):
        api.export_gguf(model, tmp_path / "a.bin", type="Q4_0")
    with pytest.raises(ModelError, match="there is no such file"):
        api.export_gguf(model, tmp_path / "a.gguf", type="Q4_0", converter=tmp_path / "none.py")
    unknown = tmp_path / "convert_hf_to_gguf.py"
    unknown.write_text("raise SystemExit('ERROR: Model Strange is not supported')")
    with pytest.raises(ModelError, match=r"does not know .* Model Strange is not supported"):
        api.export_gguf(model, tmp_path / "a.gguf", type="Q4_0", converter=unknown)
    assert not (tmp_path / "a.gguf").exists()
