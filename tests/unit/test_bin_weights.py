"""Weights as pickles become safetensors on request, and nothing but tensors comes out of them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.main import get_command

from tests.support.quantized import write_words
from tests.support.tiny import save_tiny
from vqllm import api
from vqllm.cli import app
from vqllm.errors import ModelError
from vqllm.models import bin_weights
from vqllm.models.resolve import resolve


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQLLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "source", "llama", num_hidden_layers=1)


def as_pickles(source: Path, num: int = 1) -> dict[str, torch.Tensor]:
    """Put pickles in the place of the safetensors file; its tensors."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    if num == 1:
        torch.save(tensors, source / bin_weights.SINGLE)
        return tensors
    names, weight_map = sorted(tensors), {}
    for number in range(num):
        file = f"pytorch_model-{number + 1:05d}-of-{num:05d}.bin"
        own = {name: tensors[name] for name in names[number::num]}
        torch.save(own, source / file)
        weight_map |= dict.fromkeys(own, file)
    (source / bin_weights.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize("num", [1, 3])
def test_pickles_are_converted_once_and_on_request(num: int, source: Path) -> None:
    tensors = as_pickles(source, num)
    with pytest.raises(ModelError, match=r"pickles.* --allow-bin \(in Python: allow_bin=True\)"):
        resolve(source)
    found = resolve(source, allow_bin=True).path
    stored = {
        name: t for file in found.glob("*.safetensors") for name, t in load_file(file).items()
    }
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensors[name]) for name in tensors)
    assert (found / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not [path for path in found.rglob("*") if path.suffix == ".bin"]
    assert resolve(source).path == found  # what was converted is read without being asked again


def test_every_command_with_a_model_takes_the_flag() -> None:
    for command in get_command(app).commands.values():  # type: ignore[attr-defined]
        options = {option for own in command.params for option in own.opts}
        assert ("--allow-bin" in options) == ("--trust-remote-code" in options), command.name


def test_running_a_model_of_pickles(source: Path, tmp_path: Path) -> None:
    as_pickles(source)
    text = write_words(tmp_path / "words.txt")
    runs: list[Callable[..., object]] = [
        lambda **flag: api.generate(source, "a", max_new_tokens=1, device="cpu", **flag),
        lambda **flag: api.evaluate(
            source,
            baseline=source,
            text=text,
            num_windows=1,
            window_length=16,
            device="cpu",
            **flag,
        ),
        lambda **flag: api.bench(
            source, baseline=source, prompt_tokens=4, new_tokens=1, rounds=1, device="cpu", **flag
        ),
        lambda **flag: api.load(source, **flag),
    ]
    for run in runs:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        with pytest.raises(ModelError, match="--allow-bin"):
            run()
        assert run(allow_bin=True)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": Evil()}, "holds code, which is not executed"),
        ([torch.ones(2)], "no tensors by name but list"),
        ({"model": {"a": torch.ones(2)}}, "holds dict under the name 'model'"),
        ({"a": torch.ones(1).expand(1 << 40)}, "is no plain tensor"),
    ],
)
def test_anything_else_is_refused(
    values: object, message: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    as_pickles(source)
    torch.save(values, source / bin_weights.SINGLE)
    with pytest.raises(ModelError, match=message):
        resolve(source, allow_bin=True)
    assert not (tmp_path / "executed").exists()
    assert not list((tmp_path / "cache" / "bin").glob("*.partial"))


def test_damaged_pickles_and_indices(source: Path) -> None:
    as_pickles(source)
    file = source / bin_weights.SINGLE
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="damaged"):
        resolve(source, allow_bin=True)
    file.unlink()
    for text in ('{"weight_map": {"a": "../x.bin"}}', '{"weight_map": {"a": "x.bin"}}', "[", "{}"):
        (source / bin_weights.INDEX).write_text(text)
        with pytest.raises(ModelError, match=r"incomplete|damaged"):
            resolve(source, allow_bin=True)
