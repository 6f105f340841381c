"""Files whose tensors are not those of the model: what is known of the cause is said."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vqllm
from tests.support.tiny import save_tiny
from vqllm.checkpoint.source import stored_tensors
from vqllm.errors import ModelError
from vqllm.hf import loading

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "source", tie_word_embeddings=False)


def rename(folder: Path, new: Callable[[str], str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    copies = {new(name): tensor.clone() for name, tensor in tensors.items()}
    save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def early_check(folder: Path) -> None:
    """What `quantize` does before anything else; reads headers only."""
    shapes = {name: tensor.shape for name, tensor in stored_tensors(folder).items()}
    loading.check_tensors(folder, loading.skeleton(folder), shapes)


def message_of(folder: Path) -> str:
    """What both loading and the early check say."""
    said = []
    for load in (early_check, vqllm.load):
        with pytest.raises(ModelError) as error:
            load(folder)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert "undamaged" not in said[0]
    return said[0]


@pytest.mark.parametrize("arch", ["gpt2", "opt", "gpt_neox"])
def test_names_of_another_architecture(folder: Path, tmp_path: Path, arch: str) -> None:
    other = save_tiny(tmp_path / "other", arch)
    shutil.copy(folder / "config.json", other / "config.json")
    said = message_of(other)
    names = {"gpt2": "GPT-2", "opt": "OPT", "gpt_neox": "GPT-NeoX"}
    assert f"look like those of {names[arch]}, while config.json is that of a 'llama'" in said
    assert "Put back the config.json" in said


def test_names_of_another_format(folder: Path) -> None:
    rename(folder, lambda name: name[6:].replace("self_attn.q_proj", "attention.wq"))
    assert "look like those of Meta's or Mistral's own format" in message_of(folder)


def test_packed_weights_without_their_configuration(folder: Path) -> None:
    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "proj" in name]:
            del tensors[name]
            tensors[f"{name.removesuffix('.weight')}.codes"] = torch.zeros(4, dtype=torch.int16)

    edit(folder, pack)
    said = message_of(folder)
    assert "model.layers.0.mlp.down_proj.codes" in said
    assert "config.json has no quantization_config" in said


def test_a_head_that_is_the_embedding(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert "tie_word_embeddings: false" in message_of(folder)
    edit_config(folder, tie_word_embeddings=True)
    early_check(folder)


def test_fewer_layers_than_configured(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=4)
    assert "config.json names 4 layers, and the files hold 2" in message_of(folder)


def test_one_tensor_less(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop(UP))
    assert "under no other name: the files are incomplete. Get a complete" in message_of(folder)


def test_another_shape_and_more_layers_blame_the_configuration(folder: Path) -> None:
    edit_config(folder, vocab_size=385)
    assert "put back the one that was written with these weights" in message_of(folder)
    edit_config(folder, vocab_size=384, num_hidden_layers=1)
    assert "or write the model with fewer layers" in message_of(folder)
