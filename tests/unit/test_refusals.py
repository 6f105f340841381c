"""Folders that hold something else than a model to quantize are refused by what they hold."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers.models.auto import modeling_auto as auto

import vqllm
from tests.support.tiny import save_tiny
from vqllm import api
from vqllm.checkpoint.writer import read_dense_config
from vqllm.errors import ModelError
from vqllm.hf import loading
from vqllm.hf.other_quantizers import refuse_quantized
from vqllm.hf.refusals import refuse_other_kinds
from vqllm.models import gguf as gguf_model
from vqllm.models import load as running
from vqllm.models.resolve import check_folder

BERT = {
    "vocab_size": 384,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
T5 = {"vocab_size": 384, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
BART = {
    "vocab_size": 384,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
TOKENS = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "decoder_start")}
WHISPER = {**BART, **TOKENS, "begin_suppress_tokens": None}


def save_class(folder: Path, name: str, model_type: str, **values: Any) -> Path:
    config = transformers.AutoConfig.for_model(model_type, **values)
    getattr(transformers, name)(config).save_pretrained(folder)
    return folder


def folder_of(folder: Path, config: dict[str, Any]) -> Path:
    """A folder with this configuration and weights that no test reads."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "model_type", "values"),
    [
        ("T5ForConditionalGeneration", "t5", T5),
        ("BartForConditionalGeneration", "bart", BART),
        ("WhisperForConditionalGeneration", "whisper", WHISPER),
    ],
)
def test_encoder_decoder_models_are_named(
    tmp_path: Path, name: str, model_type: str, values: dict[str, Any]
) -> None:
    folder = save_class(tmp_path / "model", name, model_type, **values)
    for use in (
        lambda: vqllm.quantize(folder, tmp_path / "q", recipe="rtn-4bit"),
        lambda: vqllm.compare(folder, tmp_path / "q", recipe="rtn-4bit"),
        lambda: vqllm.load(folder),
        lambda: api.bench(folder, device="cpu"),
    ):
        with pytest.raises(ModelError, match=rf"holds {name}: an encoder-decoder .*decoder-only"):
            use()
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("kind", ["ForMaskedLM", "ForSequenceClassification", "Model"])
def test_encoders_are_named(tmp_path: Path, kind: str) -> None:
    for name, model_type in (("Bert", "bert"), ("DebertaV2", "deberta-v2")):
        folder = save_class(tmp_path / name, f"{name}{kind}", model_type, **BERT)
        with pytest.raises(ModelError, match=f"holds {name}{kind}: an encoder, .*decoder-only"):
            check_folder(folder)


def test_every_masked_and_encoder_decoder_type_is_refused(tmp_path: Path) -> None:
    masked = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    for model_type, name in masked.items():
        with pytest.raises(ModelError, match=f"holds {name}: an encoder"):
            refuse_other_kinds(tmp_path, {"model_type": model_type, "architectures": [name]})
    for model_type in ("t5", "bart", "mbart", "whisper", "m2m_100", "encoder-decoder", "florence2"):
        with pytest.raises(ModelError, match=f"a model of type '{model_type}': an encoder-decoder"):
            refuse_other_kinds(tmp_path, {"model_type": model_type})
    with pytest.raises(ModelError, match="an encoder-decoder"):
        refuse_other_kinds(tmp_path, {"model_type": "blip-2", "text_config": {"model_type": "t5"}})
    own = {"model_type": "own", "architectures": ["Own"], "is_encoder_decoder": True}
    with pytest.raises(ModelError, match="holds Own: an encoder-decoder"):
        refuse_other_kinds(tmp_path, own)


def test_decoders_of_every_type_pass(tmp_path: Path) -> None:
    for model_type, name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if name not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() and model_type != "xlnet":
            refuse_other_kinds(tmp_path, {"model_type": model_type, "architectures": [name]})
    for model_type, name in (
        ("qwen3", "Qwen3Model"),
        ("qwen2", "Qwen2ForSequenceClassification"),
        ("llama", "LlamaForRewardModeling"),
        ("gemma3", "Gemma3ForConditionalGeneration"),
        ("llava", "LlavaForConditionalGeneration"),
        ("voxtral", "VoxtralForConditionalGeneration"),
        ("own", "OwnModel"),
    ):
        refuse_other_kinds(tmp_path, {"model_type": model_type, "architectures": [name]})
    refuse_other_kinds(tmp_path, {"model_type": "llama"})
    refuse_other_kinds(tmp_path, {"model_type": "llama", "architectures": None})
    refuse_other_kinds(tmp_path, {"model_type": "bert", "is_decoder": True})


def test_a_permutation_language_model_is_refused(tmp_path: Path) -> None:
    xlnet = {"model_type": "xlnet", "architectures": ["XLNetLMHeadModel"]}
    with pytest.raises(ModelError, match=r"XLNetLMHeadModel: a permutation .*decoder-only"):
        refuse_other_kinds(tmp_path, xlnet)
    refuse_other_kinds(tmp_path, {**xlnet, "attn_type": "uni"})  # Transformer-XL's


def test_the_decoder_of_a_bart_alone_loads(tmp_path: Path) -> None:
    vqllm.load(save_class(tmp_path / "model", "BartForCausalLM", "bart", **BART))


def test_a_model_of_no_language_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "clip", {"model_type": "clip", "architectures": ["CLIPModel"]})
    for use in (loading.skeleton, vqllm.load):
        with pytest.raises(ModelError, match=r"CLIPConfig.*\)\. Only decoder-only"):
            use(folder)


@pytest.mark.parametrize(
    ("architecture", "kind", "causal", "tensor", "message"),
    [
        ("llama", "adapter", None, "x", "only an adapter .*llama-export-lora"),
        ("clip", "mmproj", None, "x", "no model but 'mmproj'"),
        ("bert", "model", False, "x", "'bert', an encoder. Only decoder-only"),
        ("t5", "model", None, "enc.blk.0.x", "'t5', an encoder-decoder model. Only decoder-only"),
    ],
)
def test_gguf_files_of_other_kinds(
    tmp_path: Path, architecture: str, kind: str, causal: bool | None, tensor: str, message: str
) -> None:
    file = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_type(kind)
    if causal is not None:
        writer.add_causal_attention(causal)
    writer.add_tensor(tensor, torch.zeros(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=message):
        gguf_model._metadata(file, tmp_path)


def add_adapter(folder: Path) -> Path:
    """The files that PEFT writes beside the model, or instead of it."""
    values = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file({"lora_A": torch.zeros(4, 4)}, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_beside_a_model_is_merged_first(tmp_path: Path) -> None:
    folder = add_adapter(save_tiny(tmp_path / "model"))
    message = (
        r"holds a LoRA adapter \(adapter_config.json, adapter_model.safetensors\) beside the "
        r"model: merge it .*merge_and_unload.*remove its files"
    )
    for use in (
        lambda: vqllm.quantize(folder, tmp_path / "q", recipe="rtn-4bit"),
        lambda: vqllm.load(folder),
        lambda: api.bench(folder, device="cpu"),
    ):
        with pytest.raises(ModelError, match=message):
            use()
    assert not (tmp_path / "q").exists()
    for path in folder.glob("adapter_*"):
        path.unlink()
    check_folder(folder)


@pytest.mark.parametrize("others", [(), ("config.json",), ("config.json", "training_args.bin")])
def test_an_adapter_alone_names_its_model(tmp_path: Path, others: tuple[str, ...]) -> None:
    folder = add_adapter(tmp_path / "adapter")
    for name in others:
        (folder / name).write_text('{"model_type": "llama"}')
    message = r"holds only a LoRA adapter \(.*\) of org/base: merge it into that model"
    with pytest.raises(ModelError, match=message):
        vqllm.load(folder)
    (folder / "adapter_config.json").write_text("{x")
    with pytest.raises(ModelError, match=r"only a LoRA adapter \(.*\) of another model: merge"):
        vqllm.load(folder)


def test_no_copy_holds_an_adapter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, text = save_tiny(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("The quick brown fox counts 12 jars of ink. " * 400)
    sequences = ("calibration.sequences=4", "calibration.length=32")
    vqllm.quantize(
        source,
        tmp_path / "q",
        recipe="rtn-4bit",
        calibration=text,
        changes=sequences,
        evaluate=False,
        device="cpu",
    )
    quantized = add_adapter(tmp_path / "q")
    with pytest.raises(ModelError, match=r"adapter .* beside the model"):
        vqllm.tune(quantized, tmp_path / "tuned", teacher=source, calibration=text)
    vqllm.dequantize(quantized, tmp_path / "dense")
    assert "also holds an adapter (adapter_config.json" in caplog.text
    assert [path.name for path in (tmp_path / "dense").iterdir() if "adapter" in path.name] == []
    check_folder(tmp_path / "dense")


def without_tokenizer(folder: Path, arch: str) -> Path:
    for path in save_tiny(folder, arch).glob("tokenizer*"):
        path.unlink()
    return folder


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_a_missing_tokenizer_is_said_before_the_model_is_read(
    tmp_path: Path, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, text = without_tokenizer(tmp_path / "model", arch), tmp_path / "text.txt"
    text.write_text("The quick brown fox counts 12 jars of ink. " * 400)
    monkeypatch.setattr(running, "load_model", lambda *_, **__: pytest.fail("it was read"))
    for use in (
        lambda: vqllm.quantize(folder, tmp_path / "q", recipe="rtn-4bit", calibration=text),
        lambda: vqllm.quantize(folder, tmp_path / "q", recipe="rtn-4bit", calibration="self"),
        lambda: vqllm.quantize(folder, tmp_path / "q", recipe="rtn-4bit", eval_text=text),
        lambda: vqllm.compare(folder, tmp_path / "c", recipe="rtn-4bit"),
        lambda: api.evaluate(folder, text=text, device="cpu"),
        lambda: api.generate(folder, "The", device="cpu"),
    ):
        with pytest.raises(
            ModelError, match=r"has no tokenizer \(.*AutoTokenizer.*save_pretrained"
        ):
            use()
    assert not (tmp_path / "q").exists()


def test_what_needs_no_tokenizer_runs_without(tmp_path: Path) -> None:
    folder = without_tokenizer(tmp_path / "model", "llama")
    assert vqllm.load(folder)[1] is None
    api.bench(folder, device="cpu", prompt_tokens=2, new_tokens=1, rounds=1)


@pytest.mark.parametrize("kind", ["Llama", "Gemma", "Qwen2", "GPT2"])
def test_an_empty_tokenizer_is_refused(tmp_path: Path, kind: str) -> None:
    folder = without_tokenizer(tmp_path / "model", "llama")
    values = {"tokenizer_class": f"{kind}Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"no vocabulary: .* \d special tokens .*AutoTokenizer"):
        loading.load_tokenizer(folder)


def test_tokens_that_are_bytes_need_no_vocabulary(tmp_path: Path) -> None:
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    for name in ("added_tokens.json", "special_tokens_map.json"):
        (tmp_path / name).unlink(missing_ok=True)
    assert loading.load_tokenizer(tmp_path)("ab").input_ids[:2] == [100, 101]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"quantization_config": {"quant_method": "spqr", "bits": 4}}, "'spqr'), as quantization"),
        ({"quantization_config": {"quant_method": "hqq"}}, "'hqq'), as quantization_config"),
        ({"quantization_config": {"load_in_4bit": True}}, "'bitsandbytes'), as quantization"),
        ({"quantization_config": {"bits": 4}}, "'unknown'), as quantization_config in config.json"),
        ({"compression_config": {"quant_method": "x"}}, "'x'), as compression_config"),
        ({"quantization": {"bits": 4}}, "'mlx'), as quantization in config.json"),
        (
            {"quantization": {"b": 4}, "quantization_config": {"b": 4}},
            "'mlx'), as quantization_conf",
        ),
        (
            {"text_config": {"quantization_config": {"quant_method": "quark"}}},
            "'quark'), as text_config.quantization_config in config.json",
        ),
    ],
)
def test_a_model_of_another_quantizer_is_named(
    tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    config = {"model_type": "llama", **values}
    start = re.escape(f"already quantized ({said}")
    with pytest.raises(ModelError, match=f"{start}.* says. Pass the original model"):
        read_dense_config(folder_of(tmp_path, config))
    refuse_quantized(tmp_path, config, {said.split("'")[1]})


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        (
            "quantize_config.json",
            {"bits": 4, "group_size": 128},
            "quantize_config.json says 'gptq'",
        ),
        ("quantize_config.json", {"quant_method": "hqq"}, "quantize_config.json says 'hqq'"),
        ("quant_config.json", {"w_bit": 4}, "quant_config.json says 'awq'"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, "says 'nvfp4'"),
        ("other.json", {}, "config.json does not say how"),
        ("quantize_config.json", None, "config.json says 'gptq'"),
    ],
)
@pytest.mark.parametrize("name", ["qweight", "weight_packed", "W_q"])
def test_codes_beside_the_file_of_a_quantizer(
    tmp_path: Path, name: str, file: str, values: dict[str, Any] | None, said: str
) -> None:
    folder = folder_of(tmp_path, {"model_type": "llama"})
    codes = {f"model.layers.0.mlp.up_proj.{name}": torch.zeros(4, 4, dtype=torch.int32)}
    save_file(codes, folder / "model.safetensors")
    (folder / file).write_text("{x" if values is None else json.dumps(values))
    with pytest.raises(ModelError, match=f"They were quantized, and .*{said}.* Pass the original"):
        check_folder(folder)


def test_codes_of_mlx_are_not_left_to_transformers(tmp_path: Path) -> None:
    quantization = {"group_size": 64, "bits": 4}
    config = {"quantization": quantization, "quantization_config": quantization}
    folder = folder_of(tmp_path, {"model_type": "llama", **config})
    save_file(
        {"lm_head.weight": torch.zeros(4, 4, dtype=torch.uint32)}, folder / "model.safetensors"
    )
    with pytest.raises(ModelError, match=r"quantization_config in config.json says 'mlx'"):
        check_folder(folder)


def test_the_file_of_a_quantizer_beside_ordinary_weights(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    check_folder(folder)
    read_dense_config(folder)
