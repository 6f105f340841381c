"""Mixtures of experts as GGUF files, and runs that are killed and go on."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from tests.support.tiny import TEXT, save_tiny
from vqllm import api
from vqllm.errors import CheckpointError, NumericalError
from vqllm.export.coded_layers import CodedLayers
from vqllm.models.load import load

ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


def stacked(weights: dict[str, Any], layer: int) -> dict[str, np.ndarray[Any, Any]]:
    """The experts of a layer as llama.cpp has them, [E, R, C]."""
    prefix = f"model.layers.{layer}.mlp.experts."
    gate, up = weights[f"{prefix}gate_up_proj"].chunk(2, 1)
    return dict(zip(EXPERTS, (gate.numpy(), up.numpy(), weights[f"{prefix}down_proj"].numpy())))


def convert(converter: Path, folder: Path, name: str, output: Path) -> None:
    """What llama.cpp's converter makes of a Qwen3-MoE, without a tokenizer."""
    weights = load(folder, dtype=torch.float32)[0].state_dict()
    writer = gguf.GGUFWriter(output, "qwen3moe")
    writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for ours, theirs in ATTENTION.items():
            W_RC = weights[f"{prefix}self_attn.{ours}.weight"].numpy()
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", W_RC)
        router = weights[f"{prefix}mlp.gate.weight"].numpy()
        writer.add_tensor(f"blk.{layer}.ffn_gate_inp.weight", router)
        for theirs, W_ERC in stacked(weights, layer).items():
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(W_ERC))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text and a converter."""
    folder = tmp_path_factory.mktemp("experts")
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    save_tiny(folder / "model", "qwen3_moe", **sizes)
    (folder / "text.txt").write_text("\n".join(f"{i}. {TEXT}" for i in range(300)))
    (folder / "convert_hf_to_gguf.py").write_text("")
    return folder


@pytest.fixture(autouse=True)
def _own_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqllm.export.container.convert", convert)


def export(made: Path, output: Path, **options: Any) -> None:
    options = {"type": "Q4_0", "sequences": 4, "calibration": made / "text.txt"} | options
    converter = made / "convert_hf_to_gguf.py"
    api.export_gguf(made / "model", output, converter=converter, **options)


def test_experts_are_coded_and_routers_are_not(made: Path, tmp_path: Path) -> None:
    export(made, tmp_path / "out.gguf")
    reader: Any = gguf.GGUFReader(tmp_path / "out.gguf")
    tensors = {own.name: own for own in reader.tensors}
    weights = load(made / "model", dtype=torch.float32)[0].state_dict()
    for layer in range(2):
        assert tensors[f"blk.{layer}.ffn_gate_inp.weight"].tensor_type.name == "F32"
        assert tensors[f"blk.{layer}.attn_q.weight"].tensor_type.name == "Q4_0"
        for name, W_ERC in stacked(weights, layer).items():
            own = tensors[f"blk.{layer}.{name}.weight"]
            assert own.tensor_type.name == "Q4_0"
            error_ERC = gguf.dequantize(own.data, own.tensor_type) - W_ERC
            assert (np.square(error_ERC).mean((1, 2)) < 0.02 * np.square(W_ERC).mean()).all(), name
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.parametrize("mix", [None, "Q4_0,Q5_0,Q8_0"])
def test_a_killed_run_goes_on_and_writes_the_same_bytes(
    mix: str | None, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(made, tmp_path / "whole.gguf", mix=mix)
    write_layer = CodedLayers.write_layer

    def killed(self: CodedLayers, index: int, coded: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        write_layer(self, index, coded)

    output = tmp_path / "out.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(CodedLayers, "write_layer", killed)
        with pytest.raises(KeyboardInterrupt):
            export(made, output, mix=mix)
    with pytest.raises(CheckpointError, match=r'settings.type: "Q4_0" → "Q8_0"'):
        export(made, output, type="Q8_0", mix=mix)
    layers = []
    with monkeypatch.context() as patch:
        patch.setattr("vqllm.export.container.convert", None)  # its file is kept
        patch.setattr("vqllm.runs.gguf_run.sequences_of", None)  # and so are the sequences
        patch.setattr("vqllm.runs.mixed_types.MixedTypes.choose", None)  # and the types
        patch.setattr(
            CodedLayers,
            "write_layer",
            lambda self, index, coded: (layers.append(index), write_layer(self, index, coded)),
        )
        export(made, output, mix=mix)
    assert layers == [1]
    assert output.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "whole.gguf"]


def test_a_mistake_before_the_first_layer_leaves_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: CodedLayers, index: int, coded: Any) -> None:
        raise NumericalError("a weight is NaN")

    monkeypatch.setattr(CodedLayers, "write_layer", fails)
    with pytest.raises(NumericalError):
        export(made, tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []
