"""What transformers loads is what was written: checksums, and no tensor filled at random."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from tests.support.damaged import edit, edit_config
from tests.support.fake_checkpoint import FORMATS, fake_checkpoint
from vqllm.checkpoint.dequantize import dequantize_checkpoint
from vqllm.checkpoint.format import INDEX
from vqllm.checkpoint.inspect import inspect_checkpoint
from vqllm.checkpoint.reader import Checkpoint
from vqllm.errors import CheckpointError, ModelError, VqllmError

NORM = "model.layers.0.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_checkpoint(tmp_path_factory.mktemp("fake"), "qwen2").folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


@pytest.fixture
def saved(written: Path, tmp_path: Path) -> Path:
    """One file without checksums, as transformers saves it."""
    AutoModelForCausalLM.from_pretrained(written).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def load(folder: Path, cls: Any = AutoModelForCausalLM, **options: Any) -> Any:
    return cls.from_pretrained(folder, **options)


def flip(path: Path, place: float) -> None:
    """Flip a bit at this part of a file's length."""
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_flipped_bit_is_refused(number: int, place: float, folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[number]
    flip(shard, place)
    with pytest.raises(CheckpointError, match=rf"{shard.name} does not have the sha256"):
        load(folder)


def test_checksums_can_be_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(sorted(folder.glob("*.safetensors"))[-1], 1.0)
    monkeypatch.setenv("VQLLM_VERIFY", "0")
    load(folder)
    monkeypatch.setenv("VQLLM_VERIFY", "no")
    with pytest.raises(VqllmError, match="VQLLM_VERIFY is 'no'"):
        load(folder)


def test_a_link_to_the_file_is_the_file(folder: Path, tmp_path: Path) -> None:
    """As in the cache of the hub, where a snapshot links to files named by their contents."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    load(folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    flip(shard, 1.0)
    with pytest.raises(CheckpointError, match="sha256"):
        load(folder)


def test_a_file_that_was_not_written_with_the_index_is_refused(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    shard = sorted(folder.glob("*.safetensors"))[0]
    shutil.copy(shard, folder / "other.safetensors")
    names = [name for name, file in index["weight_map"].items() if file == shard.name]
    index["weight_map"] |= dict.fromkeys(names, "other.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    for reader in (load, Checkpoint.open):
        with pytest.raises(CheckpointError, match=r"other\.safetensors is none of the files"):
            reader(folder)


def test_a_saved_copy_has_no_checksums_and_loads(saved: Path) -> None:
    load(saved)


@pytest.mark.parametrize("name", [NORM, EMBEDDING, "model.layers.1.self_attn.q_proj.bias"])
@pytest.mark.parametrize("renamed", [False, True])
def test_a_missing_tensor_is_refused(name: str, renamed: bool, saved: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors.pop(name)
        if renamed:
            tensors[f"{name}s"] = tensor

    edit(saved, change)
    with pytest.raises(CheckpointError, match=f"lacks 1 of the tensors .*{name}"):
        load(saved)


def test_more_layers_than_there_are_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks \d+ of the tensors .*layers\.2\."):
        load(saved, num_hidden_layers=3, layer_types=["full_attention"] * 3)


def test_heads_that_the_checkpoint_is_not_made_for_are_new(saved: Path) -> None:
    load(saved, AutoModelForSequenceClassification, num_labels=3)
    load(saved, AutoModel)
    edit(saved, lambda tensors: tensors.pop(NORM))
    with pytest.raises(CheckpointError, match="lacks 1 of the tensors of a Qwen2ForSequence"):
        load(saved, AutoModelForSequenceClassification, num_labels=3)
    with pytest.raises(CheckpointError, match="lacks 1 of the tensors of a Qwen2Model"):
        load(saved, AutoModel)


@pytest.mark.parametrize(
    "reader",
    [
        load,
        Checkpoint.open,
        inspect_checkpoint,
        lambda folder: dequantize_checkpoint(folder, folder.with_name("dense")),
    ],
)
def test_packed_tensors_without_a_module_are_refused(
    reader: Callable[[Path], object], folder: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    name = sorted(config["modules"])[0]
    del config["modules"][name]
    edit_config(folder, quantization_config=config)
    with pytest.raises(CheckpointError, match=name):
        reader(folder)


def test_what_transformers_did_not_tie_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads that load at once leave transformers like this."""
    outside = FORMATS["uniform"]
    fake = fake_checkpoint(tmp_path, "qwen2", outside=outside, tie_word_embeddings=True)
    load(fake.folder)
    monkeypatch.setattr(PreTrainedModel, "tie_weights", lambda *args, **kwargs: None)
    with pytest.raises(ModelError, match=r"did not tie lm_head\..* load one model after the other"):
        load(fake.folder)
