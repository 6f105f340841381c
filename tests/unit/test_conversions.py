"""Tensors of a checkpoint's files become those of the model as in transformers' own loader."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from tests.support.architectures import model_class, save_tiny
from tests.support.mixtures import FORMS, MULTIMODAL, OTHERS
from tests.support.params import slow_but
from tests.support.tiny import save_tiny as save_dense
from vqllm.checkpoint.file_names import FileNames
from vqllm.checkpoint.source import SourceTensors
from vqllm.errors import ModelError
from vqllm.hf.blueprint import Blueprint
from vqllm.hf.conversions import Conversions, Renaming
from vqllm.hf.decoder_layers import layer_names, linears_of
from vqllm.hf.linears import shared_modules
from vqllm.hf.rules import with_linears

HALVES = "model.layers.1.mlp.experts.gate_up_proj"
EVERY = (
    "gemma3",
    "gemma3n_text",
    "mixtral",
    *FORMS,
    *(n for n in OTHERS if n != "mixtral"),
    *MULTIMODAL,
)
QUICK = ("mixtral", "gpt_oss", "gemma3", "laguna", "llama4", "dbrx", "gpt2", "jetmoe")


def is_matrix_of_experts(parts: Any, name: str) -> bool:
    return name in parts and (parts[name].expert is not None or parts[name].rows is not None)


def gone(blueprint: Blueprint) -> set[str]:
    parts = blueprint.parts
    return {part.tensor for name, part in parts.items() if is_matrix_of_experts(parts, name)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("saved")
    made: dict[str, Path] = {}

    def save(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = save_tiny(model_type, root / model_type.replace(" ", "_"))
        return made[model_type]

    return save


@pytest.mark.parametrize("model_type", slow_but(QUICK, EVERY))
def test_every_parameter_is_that_of_transformers_own_loader(model_type: str, saved: Any) -> None:
    source = SourceTensors.open(saved(model_type))
    blueprint = source.blueprint
    # Of a tied pair one is stored; a tensor that is loaded under several names counts once.
    own: Any = model_class(model_type).from_pretrained(saved(model_type))
    wanted: dict[str, Tensor] = own.state_dict()
    names = [name for name in blueprint.model.state_dict() if name in source]
    ties = own.all_tied_weights_keys
    left = {name for name in blueprint.model.state_dict() if name not in source}
    assert left <= set(ties), sorted(left)[:5]
    seen = set()
    for name, value in source.read_many(names):
        part = blueprint.parts.get(name)
        whole = wanted[name if part is None else part.tensor]
        expected = whole if part is None else part.of(whole)
        assert value.shape == expected.shape, name
        assert torch.equal(value, expected), name
        assert torch.equal(source.read(name), value), name
        seen.add(name)
    assert seen == set(names)
    assert source.unused() == []


@pytest.mark.parametrize("model_type", slow_but(QUICK, EVERY))
def test_names_in_the_files_come_back_to_the_module(model_type: str, saved: Any) -> None:
    """For the packed tensors of every linear and for its bias."""
    source = SourceTensors.open(saved(model_type))
    blueprint = source.blueprint
    model: Any = blueprint.model
    layers = layer_names(model)
    matrices = [
        name
        for layer in layers
        for name in linears_of(model.get_submodule(layer), layer, shared_modules(model, layers))
    ]
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    matrices += [
        name
        for name, module in model.named_modules()
        if any(module is end for end in ends) and f"{name}.weight" in source
    ]
    without = gone(blueprint)
    rules = with_linears(blueprint.conversions._rules, without, matrices, model.base_model_prefix)
    renaming = Renaming(model, rules)
    modules = dict(blueprint.model.named_modules())
    names = FileNames(blueprint, matrices)
    found = set()
    for name in matrices:
        for key in ("codes", "weight"):
            full = f"{name}.{key}"
            stored = blueprint.conversions.name_in_files(full, frozenset(without), own=True)
            module = stored.removesuffix(f".{key}")
            assert stored.endswith(f".{key}")
            assert renaming.module(module, key, modules) == name
            found.add(stored)
        assert names.module(name) == module
    assert len(found) == 2 * len(matrices), "two modules have one name"


def test_experts_of_mixtral_are_read_one_at_a_time(saved: Any) -> None:
    source = SourceTensors.open(saved("mixtral"))
    conversions = source.blueprint.conversions
    origin = conversions.origins[HALVES]
    assert len(origin.keys) == 8
    assert conversions.merges_experts(HALVES, 4)
    assert not conversions.merges_experts(HALVES, 3)
    files = load_file(saved("mixtral") / "model.safetensors")
    read: list[str] = []

    def take(key: str) -> Tensor:
        read.append(key)
        return files[key]

    whole = conversions.convert(HALVES, take)
    assert sorted(read) == sorted(origin.keys)
    for expert in range(4):
        read.clear()
        one = conversions.convert(HALVES, take, only=expert)
        assert torch.equal(one, whole[expert : expert + 1])
        assert len(read) == 2
        assert all(f".experts.{expert}." in key for key in read)


def test_with_more_than_ten_experts_each_gets_its_own(tmp_path: Path) -> None:
    """Numbers as words would put expert 10 before 2."""
    folder = save_tiny("mixtral", tmp_path / "source", num_local_experts=12)
    source = SourceTensors.open(folder)
    own: Any = AutoModelForCausalLM.from_pretrained(folder)
    for expert in range(12):
        name = f"model.layers.0.mlp.experts.{expert}.down_proj.weight"
        assert torch.equal(source.read(name), own.model.layers[0].mlp.experts.down_proj[expert]), (
            expert
        )


def test_a_rule_that_merges_nothing_reads_the_whole(saved: Any) -> None:
    conversions = SourceTensors.open(saved("gpt_oss")).blueprint.conversions
    assert not any(own.patterns for own in conversions.origins.values())
    assert not conversions.merges_experts(HALVES, 4)


def test_renamed_modules_keep_their_names_in_the_files(saved: Any) -> None:
    source = SourceTensors.open(saved("laguna"))
    files = load_file(saved("laguna") / "model.safetensors")
    renamed = "model.layers.1.mlp.shared_experts.gate_proj"
    (key,) = source.files_of(f"{renamed}.weight")
    assert key == "model.layers.1.mlp.shared_expert.gate_proj.weight"
    assert torch.equal(source.read(f"{renamed}.weight"), files[key])
    names = FileNames(source.blueprint, [renamed])
    assert names.module(renamed) == "model.layers.1.mlp.shared_expert.gate_proj"
    assert names.differ


def test_an_ordinary_model_needs_no_names(tmp_path: Path) -> None:
    source = SourceTensors.open(save_dense(tmp_path / "source", "llama"))
    names = FileNames(source.blueprint, ["model.layers.0.mlp.up_proj"])
    assert not names.differ
    assert names.of("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert not names.is_apart("model.layers.0.mlp.up_proj.weight")
    assert names.is_alone("model.layers.0.mlp.up_proj.weight")


def test_experts_are_apart_all_together_or_not_at_all(saved: Any) -> None:
    source = SourceTensors.open(saved("mixtral"))
    expert = "model.layers.0.mlp.experts.1.up_proj"
    other = "model.layers.1.mlp.experts.3.down_proj.weight"
    names = FileNames(source.blueprint, [expert])
    assert names.is_apart(other)
    assert names.is_alone(other)
    assert names.differ
    whole = FileNames(source.blueprint, ["model.layers.0.self_attn.q_proj"])
    assert not whole.is_apart(other)
    assert not whole.is_alone(other)
    assert whole.is_alone("model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_names_without_the_models_prefix_are_found_and_kept(arch: str, tmp_path: Path) -> None:
    """A model without a head, saved alone, then loaded with one."""
    whole = AutoModelForCausalLM.from_pretrained(
        save_dense(tmp_path / "whole", arch, tie_word_embeddings=True)
    )
    whole.model.save_pretrained(tmp_path / "alone")
    stored = load_file(tmp_path / "alone" / "model.safetensors")
    assert "layers.0.mlp.up_proj.weight" in stored
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(whole.config)
    conversions = Conversions(model, stored)
    assert conversions.unused == []
    for key in stored:
        assert conversions.origins[f"model.{key}"].keys == (key,)
    # And as transformers loads it by its own class, without a prefix.
    source = SourceTensors.open(tmp_path / "alone")
    own = AutoModel.from_pretrained(tmp_path / "alone").state_dict()
    assert set(source) == set(own)
    for name, value in source.read_many(own):
        assert torch.equal(value, own[name])
    assert FileNames(source.blueprint, ["layers.0.mlp.up_proj"]).differ is False


def test_what_the_model_has_no_place_for_is_named(tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(save_dense(tmp_path / "whole", "llama"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(whole.config)
    stored = [*load_file(tmp_path / "whole" / "model.safetensors"), "mtp.fc.weight"]
    assert Conversions(model, stored).unused == ["mtp.fc.weight"]


@pytest.mark.parametrize("model_type", slow_but(QUICK, EVERY))
def test_the_parameters_share_all_bytes_of_the_files(model_type: str, saved: Any) -> None:
    """Every tensor is stored once, and divided among the parameters that it holds."""
    source = SourceTensors.open(saved(model_type))
    whole = source.num_bytes()
    stored = load_file(saved(model_type) / "model.safetensors")
    assert whole == sum(value.nbytes for value in stored.values())
    counted: dict[tuple[str, ...], int] = {}
    for name in source:
        counted[source.files_of(name)] = counted.get(source.files_of(name), 0) + (
            source.num_bytes([name])
        )
    for keys, size in counted.items():
        have = sum(stored[key].nbytes for key in keys)
        # A stored tensor that goes into several of the model counts for each of them whole.
        assert size >= have or model_type == "longcat_flash", keys
    assert source.num_bytes(["no.such.tensor"]) == 0


def test_bytes_of_one_expert_are_its_part(saved: Any) -> None:
    source = SourceTensors.open(saved("mixtral"))
    for key, numel in (("gate_proj", 128 * 64), ("down_proj", 64 * 128)):
        assert source.num_bytes([f"model.layers.0.mlp.experts.3.{key}.weight"]) == 4 * numel


def test_siblings_are_made_of_the_same_tensors(saved: Any) -> None:
    source = SourceTensors.open(saved("mixtral"))
    first = "model.layers.0.mlp.experts"
    found = source.siblings(f"{first}.2.up_proj.weight")
    assert sorted(found) == sorted(
        f"{first}.{e}.{key}.weight" for e in range(4) for key in ("gate_proj", "up_proj")
    )
    q = "model.layers.0.self_attn.q_proj.weight"
    assert source.siblings(q) == [q]


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "gpt2"])
def test_rows_are_those_of_the_whole(model_type: str, saved: Any) -> None:
    source = SourceTensors.open(saved(model_type))
    for name in source:
        value = source.read(name)
        if value.dim() == 2:
            assert torch.equal(source.read_rows(name, 3, 7), value[3:7]), name


def test_a_stored_tensor_is_read_once_for_all_its_parts(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SourceTensors.open(saved("dbrx"))
    read: list[str] = []
    own = source._folder._read

    def count(key: str, take: Any) -> Tensor:
        read.append(key)
        return own(key, take)

    monkeypatch.setattr(source._folder, "_read", count)
    names = [name for name in source if ".experts." in name]
    list(source.read_many(names))
    tensors = {key for name in names for key in source.files_of(name)}
    times = {key: read.count(key) for key in tensors}
    assert max(times.values()) <= len(names) // len(tensors)
    assert source._last is None


def test_a_name_that_no_rule_brings_back_is_refused(saved: Any) -> None:
    conversions = SourceTensors.open(saved("mixtral")).blueprint.conversions
    # While the merged experts are there, a tensor of one expert goes into them.
    with pytest.raises(ModelError, match="with a pattern in `skip`"):
        conversions.name_in_files("model.layers.0.mlp.experts.0.w1.weight")


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_what_is_read_keeps_no_larger_tensor_in_memory(model_type: str, saved: Any) -> None:
    tensors = SourceTensors.open(saved(model_type))
    for name in tensors.blueprint.model.state_dict():
        if name in tensors:
            value = tensors.read(name)
            assert value.untyped_storage().nbytes() == value.nbytes, name
