"""Whole runs that quantize the embedding and the output head too."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.e2e.test_pipeline import KillAt, Killed, recipe, run, same_files
from tests.support.tiny import save_tiny
from vqllm import api
from vqllm.checkpoint import atomic
from vqllm.checkpoint.dequantize import dequantize_checkpoint
from vqllm.checkpoint.inspect import inspect_checkpoint
from vqllm.checkpoint.reader import Checkpoint
from vqllm.errors import CheckpointError, ModelError
from vqllm.recipes import Recipe
from vqllm.runtime import VQEmbedding, VQLinear

MODELS = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "untied": ("llama", {"tie_word_embeddings": False}),
    "scaled": ("gemma", {}),
    "positions": ("opt", {}),
}
UNIFORM = {"type": "uniform", "bits": 4, "group": 16}
TOKENS = torch.arange(3, 40)[None]


def small(**changes: object) -> Recipe:
    return recipe(**{"embeddings": {"codec": UNIFORM}, "head": {"codec": UNIFORM}, **changes})


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits


@pytest.mark.parametrize("which", MODELS)
def test_a_run_loads_and_expands(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(atomic, "check_space", lambda folder, num_bytes: asked.append(num_bytes))
    arch, overrides = MODELS[which]
    source = save_tiny(tmp_path / "source", arch, **overrides)
    output = tmp_path / "out"
    summary = api.quantize(source, output, recipe=small())
    assert asked == [Checkpoint.open(output).num_bytes]
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(model.get_input_embeddings(), VQEmbedding)
    assert isinstance(model.get_output_embeddings(), VQLinear)
    positions = {
        n for n, m in model.named_modules() if type(m).__name__.endswith("PositionalEmbedding")
    }
    assert summary.not_quantized.keys() == positions
    assert summary.evaluation is not None
    assert summary.evaluation["kl"] < 0.5

    found = inspect_checkpoint(output)
    assert found["format_version"] == 2
    lines = [json.loads(x) for x in (output / "report.jsonl").read_text().splitlines()]
    outside = [line for line in lines if line["layer"] is None]
    assert len(outside) == (2 if which == "untied" else 1)
    original = AutoModelForCausalLM.from_pretrained(source)
    for line in outside:
        # Codes, and 24 bits of scale and zero for 16 weights; nearest loses 0.4 % at 4 bits.
        assert line["bits_per_weight"] == 5.5
        before = original.get_submodule(line["name"]).weight.detach()
        after = model.get_submodule(line["name"]).dequantize(torch.float32)
        loss = float((after - before).square().sum() / before.square().sum())
        assert loss == pytest.approx(10 ** (-line["sqnr_db"] / 10), rel=1e-3)
        assert loss < 0.05
        assert 0 < line["proxy_loss"] < 0.006
        assert (line["num_tokens"] > 0) == (line["group"][-1] == "lm_head")
    dequantize_checkpoint(output, tmp_path / "dense", "float32")
    assert torch.allclose(logits(tmp_path / "dense"), logits(output), rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(tmp_path / "saved"), logits(output))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose head is tied, and a whole run."""
    return whole_run(tmp_path_factory.mktemp("tied"), "tied")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(tmp_path_factory.mktemp("untied"), "untied")


def whole_run(folder: Path, which: str) -> Path:
    arch, overrides = MODELS[which]
    save_tiny(folder / "source", arch, **overrides)
    run(folder / "source", folder / "whole", recipe=small())
    return folder


# An embedding of its own is announced before the layers: one event more. The head is done before
# the last event of the loop.
@pytest.mark.parametrize(
    ("which", "event", "kept"),
    [
        ("untied", 3, {"embedding"}),
        ("untied", 21, {"embedding", "head"}),
        ("tied", 11, set()),
        ("tied", 20, {"head"}),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bytes(
    which: str, event: int, kept: set[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(which)
    with pytest.raises(Killed):
        run(folder / "source", tmp_path / "out", recipe=small(), progress=KillAt(event))
    work = tmp_path / "out" / ".vqllm"
    assert {path.stem for path in work.glob("*.safetensors")} == {"sequences", *kept}
    if which == "tied" and kept:  # a damaged one is made again
        path = work / "head.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
    run(folder / "source", tmp_path / "out", recipe=small())
    assert same_files(folder / "whole", tmp_path / "out")


def test_the_embedding_alone_is_what_the_layers_see(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama", tie_word_embeddings=False)
    for name, bits in (("fine", 4), ("coarse", 1)):
        part = {"codec": {"type": "uniform", "bits": bits, "group": 16}}
        run(source, tmp_path / name, recipe=small(head=None, embeddings=part))
    first = "model-00001-of-00003.safetensors"  # its codes depend on its Hessians
    assert (tmp_path / "fine" / first).read_bytes() != (tmp_path / "coarse" / first).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fine")
    assert type(model.lm_head) is torch.nn.Linear
    assert isinstance(model.model.embed_tokens, VQEmbedding)


def test_the_head_alone(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama", tie_word_embeddings=False)
    e8p = {"codec": {"type": "e8p"}, "transforms": [{"type": "hadamard", "side": "in"}]}
    run(source, tmp_path / "out", recipe=small(head=e8p, embeddings=None))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model.lm_head, VQLinear)
    assert type(model.model.embed_tokens) is torch.nn.Embedding
    found = inspect_checkpoint(tmp_path / "out")["not_quantized"]
    assert found == {"model.embed_tokens": "an embedding"}


def test_a_head_that_is_stored_beside_its_embedding(tmp_path: Path) -> None:
    """Of equal matrices one is left; transformers ties no others, whatever config.json says."""
    source = save_tiny(tmp_path / "source", "llama", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    for difference in (0, 1):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + difference
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        output = tmp_path / str(difference)
        run(source, output, recipe=small())
        has_own = any(name.startswith("lm_head.") for name in Checkpoint.open(output).tensors)
        assert has_own == bool(difference)
        head = AutoModelForCausalLM.from_pretrained(output).lm_head
        error = (head.dequantize(torch.float32) - tensors["lm_head.weight"]).abs().max()
        assert error < 0.2


def test_a_recipe_that_the_model_cannot_follow_is_refused_at_once(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama", tie_word_embeddings=True)
    with pytest.raises(ModelError, match=r"recipe has `head` and no `embeddings`"):
        run(source, tmp_path / "out", recipe=small(embeddings=None))
    assert not (tmp_path / "out").exists()


def test_damaged_ties_are_refused(tied: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tied / "whole", tmp_path / "copy"))
    assert inspect_checkpoint(folder)["format_version"] == 2
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["tied"] = {"lm_head": "up"}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="`tied` must be an object"):
        Checkpoint.open(folder)
