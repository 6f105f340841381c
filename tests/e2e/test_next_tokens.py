"""Layers for multi-token prediction, which transformers does not run, stay in every copy."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vqllm
from tests.support.tiny import save_tiny
from vqllm.checkpoint.source_files import stored_tensors
from vqllm.errors import ModelError
from vqllm.hf import loading, next_tokens

PARTS = ("eh_proj", "enorm", "hnorm", "shared_head.norm")


def with_further_layer(folder: Path, parts: tuple[str, ...], name: str, **values: int) -> Path:
    """A llama of two layers with one more: a copy of the last one, with `parts` of its own."""
    path = save_tiny(folder) / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    last = "model.layers.1."
    for own in [own for own in tensors if own.startswith(last)]:
        tensors[own.replace(last, f"{name}.")] = tensors[own] + 1
    for part in parts:
        tensors[f"{name}.{part}.weight"] = torch.randn(64)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def check(folder: Path) -> None:
    shapes = {name: tensor.shape for name, tensor in stored_tensors(folder).items()}
    loading.check_tensors(folder, loading.skeleton(folder), shapes)


@pytest.mark.parametrize(
    ("parts", "name", "values"),
    [
        (PARTS, "model.layers.2", {}),
        ((), "model.layers.2", {"num_nextn_predict_layers": 1}),
        ((), "model.layers.2", {"mtp_num_layers": 1}),
        (PARTS, "mtp.layers.0", {}),
    ],
)
def test_they_are_known_by_number_or_by_name(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    parts: tuple[str, ...],
    name: str,
    values: dict[str, int],
) -> None:
    folder = with_further_layer(tmp_path / "model", parts, name, **values)
    next_tokens._say.cache_clear()
    for _ in range(2):
        check(folder)
    said = [r.getMessage() for r in caplog.records if r.name == next_tokens.__name__]
    assert len(said) == 1
    assert f"{9 + len(parts)} tensors" in said[0]
    assert name in said[0]
    vqllm.load(folder)


@pytest.mark.parametrize("values", [{}, {"num_nextn_predict_layers": 0}])
def test_other_layers_beyond_the_last_are_refused(tmp_path: Path, values: dict[str, int]) -> None:
    folder = with_further_layer(tmp_path / "model", (), "model.layers.2", **values)
    for use in (check, vqllm.load):
        with pytest.raises(ModelError, match=r"more layers .* model\.layers\.2\."):
            use(folder)
    folder = with_further_layer(tmp_path / "b", (), "model.layers.3", num_nextn_predict_layers=1)
    with pytest.raises(ModelError, match=r"more layers .* model\.layers\.3\."):
        check(folder)


def test_every_copy_has_them(tmp_path: Path, text: Path) -> None:
    folder = with_further_layer(tmp_path / "model", PARTS, "model.layers.2")
    further = {
        name: tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.startswith("model.layers.2.")
    }
    vqllm.quantize(
        folder,
        tmp_path / "q",
        recipe="rtn-4bit",
        calibration=text,
        changes=("calibration.sequences=4", "calibration.length=32"),
        device="cpu",
    )
    vqllm.load(tmp_path / "q")
    vqllm.dequantize(tmp_path / "q", tmp_path / "dense")
    for copy in (tmp_path / "q", tmp_path / "dense"):
        stored = {}
        for path in copy.glob("*.safetensors"):
            stored |= load_file(path)
        for name, tensor in further.items():
            assert torch.equal(stored[name], tensor), name
