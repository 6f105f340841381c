"""Files whose tensors are not those of the model: what is known of the cause is said."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vqllm
from tests.support.damaged import early_check, edit, edit_config
from tests.support.tiny import save_tiny
from vqllm.errors import ModelError

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "source", tie_word_embeddings=False)


def rename(folder: Path, new: Callable[[str], str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    copies = {new(name): tensor.clone() for name, tensor in tensors.items()}
    save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})


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


WRAPPED = {
    "torch.compile adds": lambda name: f"_orig_mod.{name}",
    "DistributedDataParallel or DeepSpeed adds": lambda name: f"module.{name}",
    "DeepSpeed and torch.compile adds": lambda name: f"module._orig_mod.{name}",
    "a multimodal model adds": lambda name: f"language_model.{name}",
    "`own.inner.`": lambda name: f"own.inner.{name}",
    "`base_model.model.`": lambda name: f"base_model.model.{name}",
    "FSDP adds": lambda name: re.sub(r"(layers\.\d+)", r"\1._fsdp_wrapped_module", name),
}


@pytest.mark.parametrize("said", WRAPPED)
@pytest.mark.parametrize("shards", [1, 2])
def test_names_with_a_wrapper_are_mended_by_what_is_said(
    folder: Path, said: str, shards: int
) -> None:
    expected = load_file(folder / "model.safetensors")
    rename(folder, WRAPPED[said])
    if shards == 2:
        split(folder)
    message = message_of(folder)
    assert said in message
    exec(message.partition("\n\n")[2], {})
    early_check(folder)
    model, _ = vqllm.load(folder, dtype=torch.float32)
    assert all(torch.equal(model.state_dict()[name], expected[name]) for name in expected)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "language_model."])
def test_a_wrapper_of_a_tied_model_beside_other_tensors(tmp_path: Path, wrapper: str) -> None:
    folder = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    rename(folder, lambda name: wrapper + name)
    edit(folder, lambda tensors: tensors.update({"vision_tower.x": torch.zeros(2, 2)}))
    assert f"with `{wrapper}` in their names" in message_of(folder)


def split(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, own in halves.items() for name in own}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)


def test_an_adapter_that_was_never_merged(folder: Path) -> None:
    def wrap(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[f"base_model.model.{name}"] = tensors.pop(name)
        q = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors[f"{q}.base_layer.weight"] = tensors.pop(f"{q}.weight")
        tensors[f"{q}.lora_A.default.weight"] = torch.zeros(4, 64)

    edit(folder, wrap)
    said = message_of(folder)
    assert "q_proj.lora_A.default.weight" in said
    assert "merge_and_unload" in said


def test_other_names_are_no_wrapper(folder: Path) -> None:
    rename(folder, lambda name: name.replace(".mlp.up", ".mlp.experts.0.up"))
    assert "a mixture of experts" in message_of(folder)
