"""Quantized folders in transformers: load, run, save, expand; and what bad ones get."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import vqllm
from tests.support.fake_checkpoint import FORMATS, RECIPE, FakeCheckpoint, fake_checkpoint
from tests.support.params import slow
from vqllm import runtime
from vqllm.checkpoint import checksums
from vqllm.errors import CheckpointError
from vqllm.integrations.transformers import VqllmConfig, register
from vqllm.runtime import VQLinear, set_weight_cache
from vqllm_kernels import dispatch
from vqllm_kernels.cpu import kernels as packed_products

MODELS = {
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_untied": ("llama", {"tie_word_embeddings": False}),
    "qwen2_biases": ("qwen2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", {}),
    "phi3": ("phi3", {}),
    "falcon": ("falcon", {"alibi": False}),  # its linears are a subclass of torch's
}
OUTSIDE_LAYERS = {
    "model.embed_tokens": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}
TOKENS = torch.arange(3, 40)[None]


@pytest.fixture(autouse=True)
def default_weight_cache() -> Iterator[None]:
    yield
    set_weight_cache("auto")


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakeCheckpoint:
    """One tied Llama that several tests read."""
    folder = tmp_path_factory.mktemp("fake")
    return fake_checkpoint(folder, "llama", tie_word_embeddings=True)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of `quantization_config` (config.json) in place."""
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def quantization_config(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("which", MODELS)
def test_load_equals_dense_and_saves_the_same_bytes(which: str, tmp_path: Path) -> None:
    arch, overrides = MODELS[which]
    fake = fake_checkpoint(tmp_path, arch, **overrides)
    model, info = AutoModelForCausalLM.from_pretrained(fake.folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    packed = {n for n, m in model.named_modules() if isinstance(m, VQLinear)}
    assert packed == fake.linears.keys()
    dense = fake.dense_model()
    assert torch.equal(logits(model), logits(dense))
    tied = model.config.tie_word_embeddings
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding.data_ptr() == head.data_ptr()) == tied
    assert not any(parameter.requires_grad for parameter in packed_parameters(model))

    model.save_pretrained(tmp_path / "saved")
    assert same_tensors(stored_tensors(tmp_path / "saved"), stored_tensors(fake.folder))
    assert quantization_config(tmp_path / "saved") == quantization_config(fake.folder)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(dense))
    again.save_pretrained(tmp_path / "again")
    names = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def packed_parameters(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    for module in model.modules():
        if isinstance(module, VQLinear):
            yield from module.parameters()


@pytest.mark.parametrize("format", [f for f in FORMATS if f != "e8p"])
def test_every_format_loads(format: str, tmp_path: Path) -> None:
    fake = fake_checkpoint(tmp_path, "llama", FORMATS[format], hidden_size=37)
    model = AutoModelForCausalLM.from_pretrained(fake.folder)
    assert torch.equal(logits(model), logits(fake.dense_model()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_honoured_and_packed_dtypes_stay(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fake_checkpoint(tmp_path, "qwen2", FORMATS["lut_row"])
    model = AutoModelForCausalLM.from_pretrained(fake.folder, dtype=dtype)
    linear = model.get_submodule(next(iter(fake.linears)))
    assert model.dtype == linear.weight.dtype == linear.bias.dtype == dtype
    for name, tensor in linear.packed.items():
        assert torch.equal(tensor, fake.packed[next(iter(fake.linears))][name])
        assert tensor.dtype == fake.packed[next(iter(fake.linears))][name].dtype
    # Products with codes as they are stored do not round W to the dtype.
    monkeypatch.setattr(packed_products, "missing", lambda wide_only: "no such instructions")
    dispatch.forget()
    assert torch.equal(logits(model), logits(fake.dense_model(dtype)))
    dispatch.forget()


@pytest.mark.parametrize("device_map", ["cpu", "auto", "disk"])
def test_device_maps_give_the_same_logits(
    device_map: str, fake: FakeCheckpoint, tmp_path: Path
) -> None:
    set_weight_cache("off")
    plain = logits(AutoModelForCausalLM.from_pretrained(fake.folder))
    places: object = device_map
    if device_map == "disk":
        places = {**OUTSIDE_LAYERS, "model.layers.0": "cpu", "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        fake.folder, device_map=places, offload_folder=tmp_path / "offload"
    )
    if device_map == "disk":
        offloaded = model.get_submodule("model.layers.1.mlp.up_proj")
        assert offloaded.is_offloaded()
        assert offloaded.codes.is_meta
    assert torch.equal(logits(model), plain)


def test_offloaded_linears_never_keep_dense_weights(fake: FakeCheckpoint, tmp_path: Path) -> None:
    places = {**OUTSIDE_LAYERS, "model.layers.0": "disk", "model.layers.1": "cpu"}
    set_weight_cache("on")
    model = AutoModelForCausalLM.from_pretrained(
        fake.folder, device_map=places, offload_folder=tmp_path / "offload"
    )
    logits(model)
    kept = {n for n, m in model.named_modules() if isinstance(m, VQLinear) and m.keeps_weights()}
    assert kept == {name for name in fake.linears if name.startswith("model.layers.1.")}
    with pytest.raises(CheckpointError, match="7 quantized linears are offloaded"):
        model.dequantize()


def test_generate(fake: FakeCheckpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(fake.folder)
    options = {"max_new_tokens": 6, "do_sample": False}
    tokens = model.generate(TOKENS, **options)
    assert tokens.shape[1] > TOKENS.shape[1]
    assert torch.equal(tokens, fake.dense_model().generate(TOKENS, **options))


def test_dequantize_gives_an_ordinary_model(fake: FakeCheckpoint, tmp_path: Path) -> None:
    expected = logits(fake.dense_model())
    loaded = AutoModelForCausalLM.from_pretrained(fake.folder).dequantize()
    config = AutoConfig.from_pretrained(fake.folder)
    config.quantization_config["dequantize"] = True
    by_config = AutoModelForCausalLM.from_pretrained(fake.folder, config=config)
    with pytest.warns(UserWarning, match="dequantize"):
        by_argument = AutoModelForCausalLM.from_pretrained(
            fake.folder, quantization_config=VqllmConfig(dequantize=True)
        )
    for model in (loaded, by_config, by_argument):
        assert not any(isinstance(module, VQLinear) for module in model.modules())
        assert not hasattr(model.config, "quantization_config")
        assert torch.equal(logits(model), expected)
    loaded.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), expected)


def test_unknown_keys_survive_and_dequantize_is_not_saved(tmp_path: Path) -> None:
    fake = fake_checkpoint(tmp_path)
    edit_json(fake.folder / "config.json", later={"key": [1, 2]})
    model = AutoModelForCausalLM.from_pretrained(fake.folder)
    model.save_pretrained(tmp_path / "saved")
    saved = quantization_config(tmp_path / "saved")
    assert saved["later"] == {"key": [1, 2]}
    assert saved["recipe"] == RECIPE
    assert "dequantize" not in saved


def test_newer_format_is_refused_by_number(tmp_path: Path) -> None:
    fake = fake_checkpoint(tmp_path)
    edit_json(fake.folder / "config.json", format_version=4)
    with pytest.raises(CheckpointError, match=r"format version 4; .* up to 3\. Upgrade"):
        AutoModelForCausalLM.from_pretrained(fake.folder)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({}, "`modules` is empty"),
        ({"model.layers.9.mlp.up_proj": "0"}, "has no module of that name"),
        ({"model.norm": "0"}, "it is a LlamaRMSNorm"),
        ({"lm_head": "0"}, "has 384 x 64 there"),
    ],
)
def test_modules_that_do_not_fit_the_model(
    modules: dict[str, str], message: str, tmp_path: Path
) -> None:
    fake = fake_checkpoint(tmp_path)
    edit_json(fake.folder / "config.json", modules=modules)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(fake.folder)


def test_missing_packed_tensor_is_an_error_not_random_weights(tmp_path: Path) -> None:
    fake = fake_checkpoint(tmp_path)
    shard = fake.folder / "model-00001-of-00003.safetensors"
    tensors = load_file(shard)
    del tensors["model.layers.0.mlp.up_proj.codes"]
    save_file(tensors, shard, metadata={"format": "pt"})
    with (
        checksums.compared(False),
        pytest.raises(CheckpointError, match=r"lacks tensors of .*0\.mlp\.up_proj: codes"),
    ):
        AutoModelForCausalLM.from_pretrained(fake.folder)


def test_packed_tensor_of_another_dtype_is_refused(tmp_path: Path) -> None:
    fake = fake_checkpoint(tmp_path)
    shard = fake.folder / "model-00001-of-00003.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.0.mlp.up_proj.codes"] = tensors["model.layers.0.mlp.up_proj.codes"].int()
    save_file(tensors, shard, metadata={"format": "pt"})
    with (
        checksums.compared(False),
        pytest.raises(CheckpointError, match=r"up_proj: codes is torch\.int32"),
    ):
        AutoModelForCausalLM.from_pretrained(fake.folder)


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    fake = fake_checkpoint(tmp_path)
    shard = fake.folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(
        CheckpointError, match=r"model-00002-of-00003\.safetensors has .* truncated"
    ):
        AutoModelForCausalLM.from_pretrained(fake.folder)


def test_a_dense_model_is_not_quantized_by_a_config(fake: FakeCheckpoint) -> None:
    with pytest.raises(ValueError, match="vqllm does require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(fake.source, quantization_config=VqllmConfig())


def test_registering_twice_changes_nothing() -> None:
    from transformers.quantizers import auto

    before = (dict(auto.AUTO_QUANTIZER_MAPPING), auto.LOADING_ATTRIBUTES_CONFIG_TYPES)
    register()
    assert before == (auto.AUTO_QUANTIZER_MAPPING, auto.LOADING_ATTRIBUTES_CONFIG_TYPES)


@pytest.mark.parametrize(
    "imports",
    [
        slow("import vqllm; from transformers import AutoModelForCausalLM"),
        "from transformers import AutoModelForCausalLM; import vqllm",
        slow(
            "import transformers.quantizers.auto; import vqllm, importlib; "
            "importlib.reload(vqllm); from transformers import AutoModelForCausalLM"
        ),
    ],
)
def test_either_order_of_import(imports: str, fake: FakeCheckpoint) -> None:
    code = f"""{imports}
model = AutoModelForCausalLM.from_pretrained({str(fake.folder)!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["VQLinear"], done.stderr


def test_describe_says_what_runs_and_why(fake: FakeCheckpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(fake.folder)
    runs = vqllm.describe(model, num_rows=(1,))
    assert {run.name for run in runs} == fake.linears.keys()
    assert {run.implementation for run in runs} == {"dense weights, kept"}
    runtime.set_weight_cache("off")
    assert {run.implementation for run in vqllm.describe(model)} == {"reference"}


def test_load_returns_model_and_tokenizer(fake: FakeCheckpoint) -> None:
    for folder in (fake.folder, fake.source):
        model, tokenizer = vqllm.load(folder, dtype=torch.bfloat16)
        assert tokenizer is not None
        assert tokenizer.decode(tokenizer("12 jars of ink").input_ids) == "12 jars of ink"
        assert model.dtype == torch.bfloat16
        assert not model.training


def test_load_names_a_damaged_file(tmp_path: Path) -> None:
    fake = fake_checkpoint(tmp_path)
    shard = fake.folder / "model-00003-of-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(
        CheckpointError, match=r"00003-of-00003\.safetensors does not have the sha256"
    ):
        vqllm.load(fake.folder)
    assert vqllm.load(fake.folder, verify=False)[1] is not None
    weights = fake.source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(vqllm.ModelError, match=r"model\.safetensors has .* truncated"):
        vqllm.load(fake.source)
