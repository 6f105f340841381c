"""Quantized embeddings and heads in transformers: load, tie, run, save, expand."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.fake_checkpoint import FORMATS, FakeCheckpoint, fake_checkpoint
from vqllm.checkpoint import checksums
from vqllm.checkpoint.dequantize import dequantize_checkpoint
from vqllm.checkpoint.inspect import bits_per_weight, inspect_checkpoint
from vqllm.checkpoint.reader import Checkpoint
from vqllm.errors import CheckpointError, PackedWeightError
from vqllm.runtime import VQEmbedding, VQLinear, set_weight_cache

MODELS = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "untied": ("llama", {"tie_word_embeddings": False}),
    "scaled": ("gemma", {}),  # an embedding of a class of its own, tied
    "positions": ("opt", {}),  # with another embedding, which is left alone
}
TOKENS = torch.arange(3, 40)[None]


@pytest.fixture(autouse=True)
def default_weight_cache() -> Iterator[None]:
    yield
    set_weight_cache("auto")


@pytest.fixture(scope="module", params=MODELS)
def fake(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    arch, overrides = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return fake_checkpoint(folder, arch, outside=FORMATS["uniform"], **overrides)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_equals_dense_and_saves_the_same(
    fake: FakeCheckpoint, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(
        fake.folder, dtype=dtype, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, VQEmbedding)
    assert isinstance(head, VQLinear)
    assert (head.codes is embedding.codes) == bool(fake.tied)
    assert not any(parameter.requires_grad for parameter in embedding.parameters())
    assert model.dtype == embedding.weight.dtype == dtype
    expected = logits(fake.dense_model(dtype))
    # Packed products of bfloat16 round at other places than torch's.
    allowed = 1e-6 if dtype == torch.float32 else 0.02
    assert (logits(model) - expected).norm() < allowed * expected.norm()

    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] in str(dtype)
    saved, stored = stored_tensors(tmp_path / "saved"), stored_tensors(fake.folder)
    assert saved.keys() == stored.keys()
    for name, tensor in stored.items():  # packed tensors keep their dtypes, all others are cast
        packed = tensor.dtype != torch.float32 or name.rsplit(".", 1)[-1] == "scale"
        assert torch.equal(saved[name], tensor if packed else tensor.to(dtype)), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.dtype == dtype
    assert torch.equal(logits(again), logits(model))
    inspect_checkpoint(tmp_path / "saved")
    again.save_pretrained(tmp_path / "again")
    for path in (tmp_path / "saved").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_transformers_own_code_for_embeddings(fake: FakeCheckpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(fake.folder)
    expected = logits(model)
    model.tie_weights()
    assert model.get_input_embeddings().weight.shape == (384, 64)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    model.resize_token_embeddings(384)
    for same in (model, copy.deepcopy(model)):
        assert torch.equal(logits(same), expected)
        tied = same.get_output_embeddings().codes is same.get_input_embeddings().codes
        assert tied == bool(fake.tied)
    with pytest.raises(PackedWeightError, match=r"model\.dequantize\(\)"):
        model.resize_token_embeddings(400)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        model.generate(TOKENS, **options), fake.dense_model().generate(TOKENS, **options)
    )


def test_device_maps(fake: FakeCheckpoint, tmp_path: Path) -> None:
    set_weight_cache("off")
    expected = logits(AutoModelForCausalLM.from_pretrained(fake.folder))
    model = AutoModelForCausalLM.from_pretrained(fake.folder, device_map="auto")
    assert torch.equal(logits(model), expected)
    names = {name for name, _ in model.named_modules()}
    outside = {*fake.linears, *fake.tied} & {n for n in names if ".layers." not in n}
    places = {
        name: "disk" if name in outside else "cpu"
        for name, module in model.named_modules()
        if not list(module.children()) and name.count(".layers.") == 0
    }
    # What comes after a scaled embedding's look-up has a place of its own below it.
    places = {n: p for n, p in places.items() if not any(n.startswith(f"{o}.") for o in outside)}
    places |= dict.fromkeys(outside, "disk")
    places |= {n: "cpu" for n in names if n.endswith((".layers.0", ".layers.1"))}
    model = AutoModelForCausalLM.from_pretrained(
        fake.folder, device_map=places, offload_folder=tmp_path / "offload"
    )
    assert model.get_input_embeddings().is_offloaded()
    for _ in range(2):
        assert torch.equal(logits(model), expected)


def test_expanded_to_an_ordinary_model(fake: FakeCheckpoint, tmp_path: Path) -> None:
    expected = logits(fake.dense_model())
    model = AutoModelForCausalLM.from_pretrained(fake.folder).dequantize()
    original = AutoModelForCausalLM.from_pretrained(fake.source)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(embedding) is type(original.get_input_embeddings())
    assert embedding.padding_idx == original.get_input_embeddings().padding_idx
    assert (embedding.weight is head.weight) == bool(fake.tied)
    assert torch.equal(logits(model), expected)
    model.tie_weights()
    model.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), expected)
    dequantize_checkpoint(fake.folder, tmp_path / "folder", "float32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert torch.equal(logits(again), expected)
    assert stored_tensors(tmp_path / "folder").keys() == stored_tensors(tmp_path / "dense").keys()


def test_sizes(fake: FakeCheckpoint) -> None:
    checkpoint = Checkpoint.open(fake.folder)
    found = inspect_checkpoint(fake.folder)
    assert (found["format_version"], found["tied"]) == (2, fake.tied)
    inside = [s for n, s in fake.linears.items() if n not in checkpoint.quantization.outside_layers]
    assert len(fake.linears) - len(inside) == (1 if fake.tied else 2)
    figures = bits_per_weight(checkpoint)
    num_weights = sum(spec.rows * spec.cols for spec in inside)
    codes = sum(16 * spec.rows * -(-spec.cols // 8) for spec in inside)
    assert figures["codes only"] == codes / num_weights
    stored = stored_tensors(fake.folder)
    parameters = sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(fake.source).parameters()
    )
    bits = 8 * sum(tensor.nbytes for tensor in stored.values())
    assert figures["whole checkpoint, embeddings included"] == pytest.approx(bits / parameters)


def test_modules_that_do_not_fit_the_model(tmp_path: Path) -> None:
    fake = fake_checkpoint(tmp_path, "llama", outside=FORMATS["uniform"])
    path = fake.folder / "config.json"
    config = json.loads(path.read_text())
    quantization = config["quantization_config"]
    inside = next(id for name, id in quantization["modules"].items() if "up_proj" in name)
    quantization["modules"]["model.embed_tokens"] = inside  # with transforms that mix rows
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"embed_tokens is quantized.* decoded one by one"):
        AutoModelForCausalLM.from_pretrained(fake.folder)


def test_missing_packed_tensor_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    fake = fake_checkpoint(tmp_path, "llama", outside=FORMATS["uniform"], tie_word_embeddings=True)
    shard = fake.folder / "model-00003-of-00003.safetensors"
    tensors = load_file(shard)
    del tensors["model.embed_tokens.zero"]
    save_file(tensors, shard, metadata={"format": "pt"})
    with (
        checksums.compared(False),
        pytest.raises(CheckpointError, match=r"lacks tensors of model\.embed_tokens: zero"),
    ):
        AutoModelForCausalLM.from_pretrained(fake.folder)
