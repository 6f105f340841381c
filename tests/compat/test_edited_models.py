"""Edited models: what is saved loads again as the model that it was, or saving is refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import vqllm
from tests.support.architectures import model_class, save_tiny
from tests.support.fake_checkpoint import (
    FORMATS,
    FakeCheckpoint,
    fake_checkpoint,
    linear_spec,
    random_packed,
    rows_spec,
)
from tests.support.mixtures import logits as sample_logits
from tests.support.params import slow, slow_but
from tests.support.quantized import quantize
from vqllm.checkpoint.inspect import inspect_checkpoint
from vqllm.errors import CheckpointError
from vqllm.runtime import PackedModule, VQEmbedding, VQLinear

TOKENS = torch.arange(3, 40)[None]

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"tie_word_embeddings": True},
    "small": {"tie_word_embeddings": True, "outside": FORMATS["residual"]},
    "untied": {"tie_word_embeddings": False, "outside": FORMATS["residual"]},
}
"""Layers quantized; embedding and head too, in one matrix or in two."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], FakeCheckpoint]:
    made: dict[str, FakeCheckpoint] = {}

    def make(kind: str) -> FakeCheckpoint:
        if kind not in made:
            made[kind] = fake_checkpoint(tmp_path_factory.mktemp(kind), "llama", **KINDS[kind])
        return made[kind]

    return make


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def densified(module: Any) -> nn.Module:
    """An ordinary module with the same weights."""
    rows, cols = module.weight.shape
    if isinstance(module, VQEmbedding):
        return nn.Embedding.from_pretrained(module.dequantize())
    linear = nn.Linear(cols, rows, bias=module.bias is not None)
    linear.weight = nn.Parameter(module.dequantize(), requires_grad=False)
    linear.bias = module.bias
    return linear


def transposed(module: VQLinear) -> nn.Module:
    """The same as a Conv1D."""
    conv = Conv1D(module.out_features, module.in_features)
    conv.weight = nn.Parameter(module.dequantize().T.contiguous(), requires_grad=False)
    assert module.bias is not None
    conv.bias = module.bias
    return conv


def of_format(format: str, rows: int, cols: int, whole: bool = True) -> VQLinear:
    spec = (linear_spec if whole else rows_spec)(FORMATS[format], rows, cols)
    return VQLinear.from_tensors(spec, random_packed(spec, 9), None, torch.float32)


def one_linear_dense(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.up_proj = densified(mlp.up_proj)


def one_layer_removed(model: Any) -> None:
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1


def first_layer_removed(model: Any) -> None:
    model.model.layers = model.model.layers[1:]
    model.model.layers[0].self_attn.layer_idx = 0
    model.config.num_hidden_layers = 1


def one_layer_doubled(model: Any) -> None:
    first, last = model.model.layers
    model.model.layers = nn.ModuleList([first, copy.deepcopy(first), last])
    model.config.num_hidden_layers = 3
    model.config.layer_types = None
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i


def layers_exchanged(model: Any) -> None:
    model.model.layers = nn.ModuleList(reversed(model.model.layers))
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i


def linears_exchanged(model: Any) -> None:
    first, last = model.model.layers
    first.mlp.up_proj, last.mlp.up_proj = last.mlp.up_proj, first.mlp.up_proj


def another_codec(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.down_proj = of_format("uniform", 64, 172)


def head_dense(model: Any) -> None:
    model.lm_head = densified(model.lm_head)


def head_exchanged(model: Any) -> None:
    model.set_output_embeddings(of_format("lut_row", 384, 64, whole=False))


def head_of_its_own(model: Any) -> None:
    head = nn.Linear(64, 384, bias=False)
    model.set_output_embeddings(head)
    model.config.tie_word_embeddings = False


def embedding_dense(model: Any) -> None:
    model.set_input_embeddings(densified(model.get_input_embeddings()))


def both_dense(model: Any) -> None:
    embedding_dense(model)
    model.lm_head = densified(model.lm_head)


def layers_dense(model: Any) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedModule) and ".layers." in name:
            model.set_submodule(name, densified(module))


def everything_dense(model: Any) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedModule):
            model.set_submodule(name, densified(module))


EDITS = [
    one_linear_dense,
    one_layer_removed,
    first_layer_removed,
    one_layer_doubled,
    layers_exchanged,
    linears_exchanged,
    another_codec,
    layers_dense,
    everything_dense,
]
EDITS_OF_ENDS = [head_dense, head_exchanged, embedding_dense, both_dense]


@pytest.mark.parametrize("kind", ["plain", slow("small"), slow("untied")])
@pytest.mark.parametrize("edit", EDITS)
def test_layers(
    edit: Callable[[Any], None], kind: str, folders: Callable[[str], FakeCheckpoint], tmp_path: Path
) -> None:
    saved_as_it_is(edit, folders(kind).folder, tmp_path)


@pytest.mark.parametrize("kind", ["small", slow("untied")])
@pytest.mark.parametrize("edit", EDITS_OF_ENDS)
def test_embeddings_and_heads(
    edit: Callable[[Any], None], kind: str, folders: Callable[[str], FakeCheckpoint], tmp_path: Path
) -> None:
    saved_as_it_is(edit, folders(kind).folder, tmp_path)


def test_a_head_of_its_own(folders: Callable[[str], FakeCheckpoint], tmp_path: Path) -> None:
    saved_as_it_is(head_of_its_own, folders("plain").folder, tmp_path)


def test_several_edits_and_saves(folders: Callable[[str], FakeCheckpoint], tmp_path: Path) -> None:
    model = load(folders("small").folder)
    for edit in (one_linear_dense, one_layer_doubled, head_dense, layers_dense):
        edit(model)
        model.save_pretrained(tmp_path / "same")
        assert torch.equal(logits(load(tmp_path / "same")), logits(model))


def saved_as_it_is(edit: Callable[[Any], None], folder: Path, work: Path) -> None:
    """Load, edit, save; load again, by every reader, and save again."""
    model = load(folder)
    edit(model)
    want = logits(model)
    model.save_pretrained(work / "saved")
    assert torch.equal(logits(model), want)
    again, info = load_with_info(work / "saved", model.dtype)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(again), want)
    if "quantization_config" in json.loads((work / "saved" / "config.json").read_text()):
        check_other_readers(model, work, want)
    else:
        assert not any(isinstance(module, PackedModule) for module in model.modules())
    if edit in (
        both_dense,
        everything_dense,
    ):  # equal dense weights of embedding and head are one again
        return
    again.save_pretrained(work / "again")
    for path in (work / "saved").iterdir():
        assert (work / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def load_with_info(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)


def check_other_readers(model: Any, work: Path, want: Tensor) -> None:
    contents = inspect_checkpoint(work / "saved")
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedModule)}
    assert {entry["name"] for entry in contents["linears"]} == packed.keys() - contents["tied"]
    assert not contents["not_quantized"].keys() & packed.keys()
    vqllm.dequantize(work / "saved", work / "dense", dtype="float32")
    dense = load(work / "dense")
    assert float((logits(dense) - want).norm() / want.norm()) < (
        1e-5 if want.dtype == torch.float32 else 0.1
    )


def test_what_was_made_dense_is_told(
    folders: Callable[[str], FakeCheckpoint], tmp_path: Path
) -> None:
    model = load(folders("plain").folder)
    one_linear_dense(model)
    one_layer_removed(model)
    model.save_pretrained(tmp_path / "saved")
    contents = inspect_checkpoint(tmp_path / "saved")
    assert contents["not_quantized"] == {
        "lm_head": "a linear outside the decoder layers",
        "model.layers.0.mlp.up_proj": "dense when the model was saved, quantized before",
    }
    assert contents["recipe"] == {"name": "fake", "seed": 7}


def test_nothing_changes_without_an_edit(
    folders: Callable[[str], FakeCheckpoint], tmp_path: Path
) -> None:
    for kind in KINDS:
        folder = folders(kind).folder
        model = load(folder)
        model.config.use_cache = False
        model.save_pretrained(tmp_path / kind)
        before, after = (
            json.loads((path / "config.json").read_text())["quantization_config"]
            for path in (folder, tmp_path / kind)
        )
        assert json.dumps(before) == json.dumps(after)


def without_config(model: Any) -> None:
    model.model.layers = model.model.layers[:1]


def config_alone(model: Any) -> None:
    model.config.num_hidden_layers = 1


def another_size(model: Any) -> None:
    model.model.layers[0].mlp.up_proj = of_format("e8p", 100, 64)


def wrapped(model: Any) -> None:
    layer = model.model.layers[0]
    layer.mlp.up_proj = nn.Sequential(layer.mlp.up_proj)


def biased(model: Any) -> None:
    one_linear_dense(model)
    linear = model.model.layers[0].mlp.up_proj
    linear.bias = nn.Parameter(torch.ones(172))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without_config, r"tensors that it lacks would be random \(model\.layers\.1\."),
        (config_alone, r"has no module of that name|have no place"),
        (another_size, "172 x 64 there"),
        (wrapped, "no module of that name"),
        (biased, r"have no place .*up_proj\.bias"),
    ],
)
def test_what_could_not_load_is_refused(
    edit: Callable[[Any], None],
    message: str,
    folders: Callable[[str], FakeCheckpoint],
    tmp_path: Path,
) -> None:
    model = load(folders("plain").folder)
    edit(model)
    with pytest.raises(CheckpointError, match=message) as raised:
        model.save_pretrained(tmp_path / "saved")
    assert "Nothing was saved." in str(raised.value)
    assert not (tmp_path / "saved").exists() or not any((tmp_path / "saved").iterdir())


def test_a_part_of_a_model(folders: Callable[[str], FakeCheckpoint], tmp_path: Path) -> None:
    """Loaded without its head, or with fewer layers, and saved so."""
    for kind in ("plain", "small"):
        model = AutoModel.from_pretrained(folders(kind).folder, dtype=torch.float32)
        model.save_pretrained(tmp_path / kind)
        again = AutoModel.from_pretrained(tmp_path / kind, dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])
        inspect_checkpoint(tmp_path / kind)
        short = load(folders(kind).folder, num_hidden_layers=1)
        short.save_pretrained(tmp_path / f"{kind} short")
        again = load(tmp_path / f"{kind} short")
        assert len(again.model.layers) == 1
        assert torch.equal(logits(again), logits(short))
        assert len(inspect_checkpoint(tmp_path / f"{kind} short")["linears"]) == 7 + (
            kind == "small"
        )


def test_copies_are_saved_by_themselves(
    folders: Callable[[str], FakeCheckpoint], tmp_path: Path
) -> None:
    model = load(folders("small").folder)
    edited = copy.deepcopy(model)
    one_layer_removed(edited)
    edited.save_pretrained(tmp_path / "edited")
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(load(tmp_path / "edited")), logits(edited))
    assert torch.equal(logits(load(tmp_path / "whole")), logits(model))


def test_saved_into_its_own_folder(tmp_path: Path) -> None:
    """transformers leaves the index of the files that were there, and reads the single file."""
    fake = fake_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    model = load(fake.folder)
    want = logits(model)
    for edit in (lambda _: None, one_linear_dense):
        edit(model)
        model.save_pretrained(fake.folder)
        assert (fake.folder / "model.safetensors.index.json").exists()
        assert torch.equal(logits(load(fake.folder)), want)
        loaded, _ = vqllm.load(fake.folder, dtype=torch.float32)
        assert torch.equal(logits(loaded), want)
        packed = [m for m in model.modules() if isinstance(m, VQLinear)]
        assert len(vqllm.inspect(fake.folder)["linears"]) == len(packed)
    dense = load(vqllm.dequantize(fake.folder, tmp_path / "dense", dtype="float32"))
    assert torch.allclose(logits(dense), want, atol=1e-4)


def test_modules_that_compute_something_else_are_refused(tmp_path: Path) -> None:
    """A square Conv1D, too, whose weight would be read transposed; an embedding that scales."""
    for model_type, options, name in (
        ("gpt2", {}, "transformer.h.0.attn.c_proj"),
        ("gemma", {"outside": FORMATS["residual"]}, "model.embed_tokens"),
    ):
        folder = tmp_path / model_type
        if model_type == "gpt2":
            quantize(save_tiny(model_type, folder / "source"), folder / "quantized")
        else:
            fake_checkpoint(folder, model_type, **options)
        model = load(folder / "quantized")
        module = model.get_submodule(name)
        model.set_submodule(name, densified(module))
        with pytest.raises(CheckpointError, match=rf"{name}: (Linear, not Conv1D|Embedding, not)"):
            model.save_pretrained(tmp_path / "saved")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", slow_but([], ["mixtral", "qwen3_moe", "gpt2", "gemma3"]))
def test_other_types(model_type: str, tmp_path: Path) -> None:
    """Experts, Conv1D, a text tower of a multimodal model: one module dense, or a layer removed."""
    quantize(save_tiny(model_type, tmp_path / "source"), tmp_path / "quantized")
    cls = model_class(model_type)
    model = cls.from_pretrained(tmp_path / "quantized", dtype=torch.float32)
    name, module = next((n, m) for n, m in model.named_modules() if isinstance(m, VQLinear))
    model.set_submodule(name, transposed(module) if model_type == "gpt2" else densified(module))
    want = sample_logits(model)
    model.save_pretrained(tmp_path / "saved")
    again = cls.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(sample_logits(again), want)
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    stored = {entry["name"] for entry in inspect_checkpoint(tmp_path / "saved")["linears"]}
    assert all(any(key.startswith(f"{name}.") for key in tensors) for name in stored)
