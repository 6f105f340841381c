"""What files claim is compared with what they are, before time or memory is spent on it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.support.architectures import save_tiny as save_tiny_of
from tests.support.fake_checkpoint import fake_checkpoint
from tests.support.quantized import quantize
from tests.support.tiny import save_tiny
from vqllm import api
from vqllm.checkpoint.shards import read_header
from vqllm.core import json_text, path_names
from vqllm.errors import MAX_MESSAGE, CheckpointError, ModelError, RecipeError, VqllmError
from vqllm.hf.claims import refuse_claims
from vqllm.hf.loading import load_model
from vqllm.models.resolve import resolve
from vqllm.recipes import load
from vqllm.recipes.yaml_text import NOT_YAML, parse_yaml


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 1 << 31},
        {"num_hidden_layers": 5000},
        {"text_config": {"num_hidden_layers": 1 << 31}},
        {"num_experts": 1 << 31},
        {"head_dim": 1 << 31},
        {"text_config": {"qk_rope_head_dim": 1 << 17}},
        {"rope_parameters": {"partial_rotary_factor": 1e7}},
        {"mamba_chunk_size": 10**5},
        {"n_heads": 10**8},
        {"max_seq_len": 10**8},
    ],
)
def test_sizes_that_no_model_has(values: dict[str, Any], tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama", num_hidden_layers=1)
    refuse_claims(source)
    change(source, **values)
    with pytest.raises(ModelError, match=r"config\.json is damaged: \w+ is"):
        refuse_claims(source)


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size", "num_key_value_heads"])
def test_larger_tensors_than_stored(key: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama", num_hidden_layers=1)
    load_model(source)
    change(source, **{key: 10**7})
    with pytest.raises(ModelError, match=r"config\.json asks for \d+ numbers, .* have at most"):
        load_model(source)


def test_larger_tensors_than_a_checkpoint_has(tmp_path: Path) -> None:
    folder = fake_checkpoint(tmp_path, num_hidden_layers=1).folder
    AutoModelForCausalLM.from_pretrained(folder)
    change(folder, vocab_size=10**7)
    with pytest.raises(ModelError, match=r"config\.json asks for \d+ numbers, .* have at most"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_models_that_load_and_do_not_run(tmp_path: Path) -> None:
    source = save_tiny_of("mixtral", tmp_path / "source")
    change(source, num_experts_per_tok=1000)
    with pytest.raises(ModelError, match=r"MixtralForCausalLM does not run: .*out of range"):
        api.generate(source, "a", max_new_tokens=1, device="cpu")
    with pytest.raises(ModelError, match=r"MixtralForCausalLM does not run: .*out of range"):
        quantize(source, tmp_path / "output")


@pytest.mark.parametrize("depth", [101, 2000, 100_000])
def test_nested_json(depth: int, tmp_path: Path) -> None:
    text = "[" * depth + "]" * depth
    with pytest.raises(ValueError, match="nested more than 100"):
        json_text.loads(text)
    source = save_tiny(tmp_path / "source", "llama", num_hidden_layers=1)
    (source / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json is damaged: nested more than"):
        resolve(source)


def test_json_of_more_values_or_bytes_than_any_model_has(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more than 3000000 values"):
        json_text.loads("[" + "[]," * 2_000_000 + "[]]")
    with pytest.raises(ValueError, match="more than 3000000 values"):
        json_text.loads(b"[" + b"1," * 4_000_000 + b"1]")
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="more than any such file has"):
        json_text.read(tmp_path / "config.json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="no ordinary file"):
        json_text.read(tmp_path / "pipe.json")


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [*x]",
        "a: &x {b: *x}",
        "[" * 200 + "]" * 200,
        "[" * 5000 + "]" * 5000,
        "a: &a [1,1,1,1,1,1,1,1,1]\n"
        + "".join(f"{y}: &{y} [{','.join(9 * [f'*{x}'])}]\n" for x, y in zip("abcdefg", "bcdefgh")),
    ],
)
def test_yaml_without_end(text: str, tmp_path: Path) -> None:
    with pytest.raises(NOT_YAML):
        parse_yaml(text)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.yaml is not YAML") as caught:
        load(tmp_path / "recipe.yaml")
    assert len(str(caught.value)) <= MAX_MESSAGE + 100


def test_aliases_are_taken() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x") == {"a": [1, 2], "b": [1, 2]}
    assert parse_yaml("") is None


def test_messages_are_bounded() -> None:
    message = str(VqllmError("a" * 10**6 + " what to do"))
    assert len(message) <= MAX_MESSAGE + 100
    assert message.endswith("what to do")


def header(**entry: Any) -> bytes:
    text = json.dumps(
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry}
    ).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4)


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": "I64"},
        {"shape": [True]},
        {"shape": [-1]},
        {"shape": [1.5]},
        {"shape": None},
        {"dtype": 3},
        {"data_offsets": [0]},
        {"data_offsets": "04"},
        {"data_offsets": {"a": 1, "b": 2}},
    ],
)
def test_headers_with_other_types(entry: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(header())
    assert read_header(file)["x"].num_bytes == 4
    file.write_bytes(header(**entry))
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        read_header(file)


def test_pipes_and_sparse_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="no ordinary file"):
        read_header(tmp_path / "pipe.safetensors")
    with (tmp_path / "sparse.safetensors").open("wb") as file:
        file.write(header())
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_header(tmp_path / "sparse.safetensors")


@pytest.mark.parametrize("name", ["x" * 300, os.fsdecode(b"caf\xe9"), "a\0b"])
def test_names_that_no_library_takes(name: str) -> None:
    assert path_names.problem(name) is not None
    assert len(path_names.shown(name)) <= 300
    with pytest.raises(ModelError, match="cannot be a model: "):
        resolve(name)


def test_other_names() -> None:
    assert path_names.problem("größe/大きさ\n") is None
    assert "\n" not in path_names.shown("a\nb")
