"""The checkpoint format: description, files, sizes, damage, and the way back to a dense folder."""

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.fake_checkpoint import (
    FORMATS,
    RECIPE,
    FakeCheckpoint,
    fake_checkpoint,
    linear_spec,
)
from tests.support.tiny import tiny_model
from vqllm.checkpoint import atomic, checksums, new_folder, side_files, writer
from vqllm.checkpoint.dequantize import dequantize_checkpoint
from vqllm.checkpoint.format import QuantizationConfig
from vqllm.checkpoint.inspect import inspect_checkpoint
from vqllm.checkpoint.reader import Checkpoint, is_checkpoint
from vqllm.checkpoint.shards import natural_order, read_header
from vqllm.core.bits import count
from vqllm.errors import CheckpointError, ModelError, OutOfSpaceError
from vqllm.report import pages
from vqllm_kernels import formats
from vqllm_kernels.formats import FormatSpec

SHARD = "model-00001-of-00003.safetensors"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> FakeCheckpoint:
    """A checkpoint that tests read and do not change."""
    return fake_checkpoint(tmp_path_factory.mktemp("fake"), "qwen2", FORMATS["residual"])


@pytest.fixture
def fake(shared: FakeCheckpoint, tmp_path: Path) -> FakeCheckpoint:
    """A copy of it that a test may damage."""
    shutil.copytree(shared.folder, tmp_path / "copy")
    return FakeCheckpoint(tmp_path / "copy", shared.source, shared.linears, shared.packed)


def files(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def patch_json(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_config_describes_each_distinct_specification_once() -> None:
    a, b = linear_spec(FORMATS["e8p"], 16, 24), linear_spec(FORMATS["uniform"], 16, 24)
    linears = {"x.0": a, "x.1": b, "x.2": a}
    config = QuantizationConfig.build(linears, recipe=RECIPE)
    assert len(config.specs) == 2
    assert config.modules["x.0"] == config.modules["x.2"] != config.modules["x.1"]
    text = json.dumps(config.to_dict(), sort_keys=True)
    again = QuantizationConfig.parse(json.loads(text), "here")
    assert again == config
    assert again.linears() == linears
    reordered = QuantizationConfig.build(dict(reversed(linears.items())), recipe=RECIPE)
    assert json.dumps(reordered.to_dict(), sort_keys=True) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quantized by 'gptq', not by 'vqllm'"),
        ({"format_version": 7}, "format version 7; this vqllm reads versions up to 3. Upgrade"),
        ({"format_version": "one"}, "format_version is 'one', expected a number from 1 to 3"),
        ({"format_version": True}, "format_version is True"),
        ({"specs": None}, "must be JSON objects, found NoneType and dict"),
        ({"modules": {"a": "9"}}, "name the specifications 9, which `specs` does not have"),
    ],
)
def test_config_that_cannot_be_read(change: dict[str, object], message: str) -> None:
    values = QuantizationConfig.build({"a": linear_spec(FORMATS["e8p"], 8, 8)}).to_dict()
    with pytest.raises(CheckpointError) as caught:
        QuantizationConfig.parse({**values, **change}, "here")
    assert message in str(caught.value)


def test_version_2_says_what_is_tied_and_what_is_outside_the_layers() -> None:
    linears = {name: linear_spec(FORMATS["e8p"], 8, 8) for name in ("layers.0.up", "emb")}
    inside = QuantizationConfig.build({"layers.0.up": linears["layers.0.up"]}).to_dict()
    assert inside["format_version"] == 1
    assert not inside.keys() & {"tied", "outside_layers"}
    config = QuantizationConfig.build(linears, outside_layers={"emb"}, tied={"head": "emb"})
    values = json.loads(json.dumps(config.to_dict()))
    assert values["format_version"] == 2
    assert values["tied"] == {"head": "emb"}
    assert QuantizationConfig.parse(values, "here") == config
    for change in (
        {"tied": {"head": "nothing"}},
        {"tied": {"emb": "emb"}},
        {"tied": None},
        {"outside_layers": ["nothing"]},
        {"outside_layers": "emb"},
        {"outside_layers": [3]},
    ):
        with pytest.raises(CheckpointError, match=r"here: `tied` must be an object and"):
            QuantizationConfig.parse({**values, **change}, "here")


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec["codec"].update(format="e9-v3"),
        lambda spec: spec["codec"].update(surprise=1),
        lambda spec: spec["transforms"][0].update(kind="rotation"),
        lambda spec: spec.pop("rows"),
        lambda spec: spec.update(transforms=3),
    ],
)
def test_unknown_specification_names_its_id(change: Callable[[dict], object]) -> None:
    config = QuantizationConfig.build({"a": linear_spec(FORMATS["e8p"], 8, 8)})
    change(config.specs["0"])
    with pytest.raises(CheckpointError, match=r"specification '0' cannot be read: .*upgrade vqllm"):
        config.linears()


def test_writing_twice_gives_the_same_bytes(shared: FakeCheckpoint, tmp_path: Path) -> None:
    again = fake_checkpoint(tmp_path, "qwen2", FORMATS["residual"])
    assert files(again.folder) == files(shared.folder)


def test_index_matches_the_files(shared: FakeCheckpoint) -> None:
    index = json.loads((shared.folder / "model.safetensors.index.json").read_text())
    shards = sorted(shared.folder.glob("*.safetensors"))
    assert index["metadata"]["vqllm"]["sha256"] == {
        s.name: hashlib.sha256(s.read_bytes()).hexdigest() for s in shards
    }
    stored = {name: (s.name, t) for s in shards for name, t in load_file(s).items()}
    assert index["weight_map"] == {name: shard for name, (shard, _) in stored.items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for _, t in stored.values())
    for name, (shard, _) in stored.items():
        assert ("layers.0." in name) == shard.startswith("model-00001")
        assert ("layers.1." in name) == shard.startswith("model-00002")


def test_source_config_is_kept_and_small_files_are_copied(tmp_path: Path) -> None:
    source = fake_checkpoint(tmp_path / "first").source
    patch_json(source / "config.json", lambda c: c.update(rope_theta=1234.5, unheard_of=[1]))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    for name in ("LICENSE", "code.py", "README.md", "old.bin", ".hidden", "x.index.json"):
        (source / name).write_text(name)
    out, staging = tmp_path / "out", tmp_path / "out" / "s"
    staging.mkdir(parents=True)
    config = QuantizationConfig.build({"a": linear_spec(FORMATS["e8p"], 8, 8)})
    writer.write_config(source, out, staging, config)
    side_files.copy_files(source, out, staging)
    written = json.loads((out / "config.json").read_text())
    assert written.pop("quantization_config") == config.to_dict()
    assert written == json.loads((source / "config.json").read_text())
    copied = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} - {"config.json"}
    assert copied == {
        "LICENSE",
        "additional_chat_templates/tool.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in copied)
    side_files.copy_files(source, out, staging, trust_remote_code=True)
    assert (out / "code.py").read_text() == "code.py"
    assert not list(staging.iterdir())


def test_quantized_source_is_refused(shared: FakeCheckpoint) -> None:
    with pytest.raises(ModelError, match=r"already quantized \('vqllm'\).*vqllm dequantize"):
        writer.read_dense_config(shared.folder)


def test_shard_is_readable_by_others_and_independent_of_order(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(5), "a": torch.ones(3, 2).T, "c": torch.zeros(0)}
    one = atomic.write_shard(tmp_path / "one", tensors, tmp_path)
    two = atomic.write_shard(tmp_path / "two", dict(reversed(tensors.items())), tmp_path)
    assert one == two == hashlib.sha256((tmp_path / "one").read_bytes()).hexdigest()
    (tmp_path / "plain").touch()
    assert (tmp_path / "one").stat().st_mode == (tmp_path / "plain").stat().st_mode
    loaded = load_file(tmp_path / "one")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_full_disk_leaves_the_old_file_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    for write in (
        lambda: atomic.write_bytes(tmp_path / "file", b"new", tmp_path),
        lambda: atomic.write_shard(tmp_path / "file", {"a": torch.ones(3)}, tmp_path),
    ):
        with pytest.raises(OutOfSpaceError, match=r"no space left for .*run the same command"):
            write()
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


def test_space_is_checked_before_the_start(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    atomic.check_space(tmp_path / "not" / "yet", free // 2)
    with pytest.raises(OutOfSpaceError, match=r"needs .* MB more, and .* MB are free"):
        atomic.check_space(tmp_path / "not" / "yet", 2 * free)


def test_reader_gives_the_tensors_that_were_written(shared: FakeCheckpoint) -> None:
    checkpoint = Checkpoint.open(shared.folder)
    assert checkpoint.linears == shared.linears
    dense = shared.dense_model().state_dict()
    for name, tensors in shared.packed.items():
        read = checkpoint.packed(name)
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[key], tensors[key]) for key in tensors)
        assert torch.equal(checkpoint.dense(name), dense[f"{name}.weight"])
    others = checkpoint.other_tensors()
    assert "model.layers.0.self_attn.q_proj.bias" in others
    assert all(torch.equal(checkpoint.read(name), dense[name]) for name in others)
    assert is_checkpoint(shared.folder)
    assert not is_checkpoint(shared.source)
    assert not is_checkpoint(shared.folder / "nothing")


def test_bits_equal_the_stored_tensors(shared: FakeCheckpoint) -> None:
    found = inspect_checkpoint(shared.folder)
    stored = {k: v for f in shared.folder.glob("*.safetensors") for k, v in load_file(f).items()}
    num_weights = 0
    for row in found["linears"]:
        spec, packed = shared.linears[row["name"]], shared.packed[row["name"]]
        bits = count(spec.layout())
        assert (row["bits_codes"], row["bits_codebook"], row["bits_side"]) == (
            bits.codes,
            bits.codebook,
            bits.side,
        )
        assert 8 * sum(t.nbytes for t in packed.values()) == bits.total
        assert row["bits_per_weight"] == bits.total / (row["rows"] * row["cols"])
        num_weights += row["rows"] * row["cols"]
    total = 8 * sum(t.nbytes for t in stored.values())
    unquantized = sum(p.numel() for p in shared.dense_model().parameters())
    figures = found["bits_per_weight"]
    assert len(figures) == 3
    assert figures["whole checkpoint, embeddings included"] == total / unquantized
    codes = [t for name, t in stored.items() if name.endswith("_codes")]
    assert figures["codes only"] == 8 * sum(t.nbytes for t in codes) / num_weights
    assert 3.0 <= figures["codes only"] < figures["all of a quantized linear"]
    assert found["num_bytes"] * 8 == total
    assert found["recipe"] == RECIPE
    assert "seed: 7" in found["recipe_yaml"]
    assert [row["proxy_loss"] for row in found["linears"]] == [None] * len(shared.linears)


@pytest.mark.parametrize("arch", ["qwen2", "gemma2"])  # two matrices outside the layers, one
@pytest.mark.parametrize("outside", [None, FORMATS["uniform"]], ids=["layers", "all"])
def test_parameters_are_counted_in_the_stored_tensors(
    arch: str, outside: FormatSpec | None, tmp_path: Path
) -> None:
    folder = fake_checkpoint(tmp_path, arch, outside=outside).folder
    found = inspect_checkpoint(folder)["parameters"]
    model = tiny_model(arch)
    layers = model.get_submodule("model.layers")
    linears = [m.weight.numel() for m in layers.modules() if isinstance(m, torch.nn.Linear)]
    ends = sum(p.numel() for p in model.parameters() if p.dim() == 2) - sum(linears)
    assert found == {
        "layers": sum(p.numel() for p in layers.parameters()),
        "layers_quantized": sum(linears),
        "model": sum(p.numel() for p in model.parameters()),
        "model_quantized": sum(linears) + (ends if outside else 0),
    }


def test_layers_are_in_their_order() -> None:
    names = ["layers.10.q", "layers.9.up", "layers.9.q", "layers.2.q", "norm"]
    ordered = ["layers.2.q", "layers.9.q", "layers.9.up", "layers.10.q", "norm"]
    assert sorted(names, key=natural_order) == ordered


def test_inspect_joins_the_report(fake: FakeCheckpoint) -> None:
    name = next(iter(fake.linears))
    lines = [json.dumps({"name": name, "proxy_loss": 0.25}), "damaged", '{"name": "stranger"}']
    (fake.folder / pages.JSONL).write_text("\n".join(lines))
    losses = {r["name"]: r["proxy_loss"] for r in inspect_checkpoint(fake.folder)["linears"]}
    assert losses.pop(name) == 0.25
    assert set(losses.values()) == {None}


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_one_bit, r"00001-of-00003\.safetensors does not have the sha256"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), r"00001-of-00003\.safetensors has .*trunc"),
        (lambda p: p.write_bytes(p.read_bytes()[:5]), r"00003\.safetensors is not a safetensors"),
        (lambda p: p.write_bytes(b"\xff" * 100), r"00003\.safetensors is not a safetensors"),
        (Path.unlink, r"00001-of-00003\.safetensors is missing"),
    ],
)
def test_damaged_shard_is_named(
    damage: Callable[[Path], object], message: str, fake: FakeCheckpoint
) -> None:
    damage(fake.folder / SHARD)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(fake.folder)


def test_without_verification_a_flipped_bit_passes_and_a_truncated_file_does_not(
    fake: FakeCheckpoint,
) -> None:
    flip_one_bit(fake.folder / SHARD)
    Checkpoint.open(fake.folder, verify=False)
    (fake.folder / SHARD).write_bytes((fake.folder / SHARD).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint.open(fake.folder, verify=False)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda c: c.pop("quantization_config"), "has no quantization_config"),
        (
            "config.json",
            lambda c: c["quantization_config"]["modules"].update({"a.b": "0"}),
            "a.b is quantized, but its tensor",
        ),
        (
            "model.safetensors.index.json",
            lambda i: i["weight_map"].update(nowhere=SHARD),
            "1 tensors that no shard has, first nowhere",
        ),
        (
            "model.safetensors.index.json",
            lambda i: i["weight_map"].pop("model.norm.weight"),
            r"leaves out 1 tensors of its shards, first model\.norm\.weight",
        ),
        (
            "config.json",
            lambda c: c["quantization_config"].update(modules={}),
            "`modules` is empty",
        ),
        (
            "config.json",
            lambda c: c["quantization_config"]["modules"].update({"a.b": ["0"]}),
            "which `specs` does not have",
        ),
        (
            "model.safetensors.index.json",
            lambda i: i["weight_map"].update(x="../secret.safetensors"),
            r"files outside its folder: \.\./secret",
        ),
        (
            "model.safetensors.index.json",
            lambda i: i.pop("weight_map"),
            "index.json cannot be read",
        ),
    ],
)
def test_inconsistent_folder(
    file: str, change: Callable[[dict], object], message: str, fake: FakeCheckpoint
) -> None:
    patch_json(fake.folder / file, change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(fake.folder)


@pytest.mark.parametrize("change", [lambda t: t.int(), lambda t: t[:, :-1].contiguous()])
def test_tensor_that_is_not_what_its_specification_asks_for(
    change: Callable[[torch.Tensor], torch.Tensor], fake: FakeCheckpoint, tmp_path: Path
) -> None:
    name = "model.layers.0.mlp.up_proj.s0_codes"
    tensors = load_file(fake.folder / SHARD)
    atomic.write_shard(fake.folder / SHARD, {**tensors, name: change(tensors[name])}, tmp_path)
    with pytest.raises(CheckpointError, match=rf"{name} is I.* asks for torch\.int16 \(172, 8\)"):
        Checkpoint.open(fake.folder, verify=False)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("s0_scale", lambda t: t * torch.nan, "stage 0: 1 of the 1 numbers of scale are NaN"),
        ("t0_scale", lambda t: t * 0, "scale transform: 64 entries of scale are 0"),
        ("t1_permutation", lambda t: t * 0, "not have every index of 0..63 once"),
    ],
)
def test_values_that_cannot_be_decoded(
    key: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    message: str,
    fake: FakeCheckpoint,
    tmp_path: Path,
) -> None:
    module = "model.layers.0.mlp.up_proj"
    tensors = load_file(fake.folder / SHARD)
    tensors[f"{module}.{key}"] = change(tensors[f"{module}.{key}"])
    atomic.write_shard(fake.folder / SHARD, tensors, tmp_path)
    checkpoint = Checkpoint.open(fake.folder, verify=False)
    with pytest.raises(CheckpointError, match=rf"{module}: .*{message}"):
        checkpoint.dense(module)
    with checksums.compared(False), pytest.raises(CheckpointError, match=rf"{module}: .*{message}"):
        AutoModelForCausalLM.from_pretrained(fake.folder)


def test_no_folder_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no checkpoint: it has no config\.json"):
        Checkpoint.open(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        Checkpoint.open(tmp_path)


def test_folder_saved_by_transformers_reads_the_same(
    shared: FakeCheckpoint, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_pretrained(shared.folder).save_pretrained(tmp_path / "saved")
    before, after = Checkpoint.open(shared.folder), Checkpoint.open(tmp_path / "saved")
    assert after.linears == before.linears
    name = next(iter(shared.linears))
    assert torch.equal(after.dense(name), before.dense(name))


def test_header_agrees_with_safetensors(shared: FakeCheckpoint) -> None:
    tensors = load_file(shared.folder / SHARD)
    header = read_header(shared.folder / SHARD)
    assert header.keys() == tensors.keys()
    for name, stored in header.items():
        assert stored.shape == tuple(tensors[name].shape)
        assert (stored.num_bytes, stored.numel) == (tensors[name].nbytes, tensors[name].numel())


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_dequantized_folder_is_an_ordinary_model(
    dtype: str, shared: FakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_folder, "MAX_SHARD_BYTES", 40_000)
    out = dequantize_checkpoint(shared.folder, tmp_path / "dense", dtype)
    torch_dtype = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    shards = list(out.glob("*.safetensors"))
    assert len(shards) > 3
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == str(torch_dtype).removeprefix("torch.")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch_dtype
    expected = shared.dense_model(torch_dtype).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(out)("a model").input_ids
    assert not (tmp_path / "dense.partial").exists()
    assert not [p.name for p in out.iterdir() if p.name.startswith((".", "report"))]


def test_dequantize_leaves_pages_about_the_quantized_model_behind(
    fake: FakeCheckpoint, tmp_path: Path
) -> None:
    names = {pages.JSONL, pages.PAGE, pages.CARD, pages.PLOT}
    for page in names:
        (fake.folder / page).write_text("about the checkpoint")
    out = dequantize_checkpoint(fake.folder, tmp_path / "dense")
    assert not {path.name for path in out.iterdir()} & names


def test_dequantize_leaves_its_neighbours_alone(fake: FakeCheckpoint, tmp_path: Path) -> None:
    neighbour = tmp_path / "dense.partial"
    neighbour.mkdir()
    (neighbour / "file").touch()
    dequantize_checkpoint(fake.folder, tmp_path / "dense")
    assert (neighbour / "file").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert (tmp_path / "dense").stat().st_mode == neighbour.stat().st_mode


def test_dequantize_refuses(fake: FakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not empty"):
        dequantize_checkpoint(fake.folder, fake.source)
    with pytest.raises(CheckpointError, match=r"dtype 'int4'; allowed are auto, bfloat16"):
        dequantize_checkpoint(fake.folder, tmp_path / "out", "int4")
    with pytest.raises(CheckpointError, match="no vqllm checkpoint"):
        dequantize_checkpoint(fake.source, tmp_path / "out")


def test_dequantize_on_a_full_disk_leaves_nothing(
    shared: FakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OutOfSpaceError, match=r"dense model has .* MB\. Nothing was left there"):
        dequantize_checkpoint(shared.folder, tmp_path / "dense")
    assert not list(tmp_path.iterdir())


def test_dequantize_refuses_weights_beyond_float16(tmp_path: Path) -> None:
    fake = fake_checkpoint(tmp_path, "llama", num_hidden_layers=1)
    name = next(iter(fake.linears))
    shard = fake.folder / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    tensors[f"{name}.scale"] = torch.full_like(tensors[f"{name}.scale"], 1e6)
    digest = atomic.write_shard(shard, tensors, tmp_path)
    patch_json(
        fake.folder / "model.safetensors.index.json",
        lambda index: index["metadata"]["vqllm"]["sha256"].update({shard.name: digest}),
    )
    with pytest.raises(CheckpointError, match=rf"{name}.weight has values up to .*Use bfloat16"):
        dequantize_checkpoint(fake.folder, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    dequantize_checkpoint(fake.folder, tmp_path / "out", "bfloat16")


def documented(key: str) -> tuple[str, list[dict[str, Any]]]:
    """The page of the format, and what its examples say under a key, those that have it."""
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    texts = [part.split("```")[0] for part in page.split("```jsonc\n")[1:]]
    examples = [json.loads("{" + re.sub(r" +//.*", "", text) + "}") for text in texts]
    return page, [example[key] for example in examples if key in example]


def test_the_documented_codecs_are_formats() -> None:
    _, codecs = documented("codec")
    layouts = {
        codec["format"]: {
            name: list(tensor.shape)
            for name, tensor in formats.from_dict(codec).layout(64, 16).items()
        }
        for codec in codecs
    }
    assert layouts == {
        "trellis-v2": {"codes": [1, 4, 32], "scale": [1], "table": [64, 1]},
        "trellis-v3": {"codes": [4, 1, 40], "scale": [1]},
    }


@pytest.mark.parametrize(
    ("number", "version", "num_modules", "module"),
    [(1, 1, 2, "model.layers.0.mlp.down_proj"), (2, 2, 1, "model.embed_tokens")],
)
def test_the_documented_examples_are_valid_configurations(
    number: int, version: int, num_modules: int, module: str
) -> None:
    page, examples = documented("quantization_config")
    values = examples[number - 1]
    config = QuantizationConfig.parse(values, "the example")
    linears = config.linears()
    assert (config.format_version, len(linears)) == (version, num_modules)
    listed = re.findall(rf"^    {re.escape(module)}\.(\w+) +(\w+) +\[(.*)\]", page, re.M)
    layout = linears[module].layout()
    assert [(name, dtype, shape) for name, dtype, shape in listed] == [
        (name, str(t.dtype).removeprefix("torch."), ", ".join(map(str, t.shape)))
        for name, t in layout.items()
    ]
