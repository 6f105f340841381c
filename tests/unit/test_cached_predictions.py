"""The original's predictions from stored states: those of the model itself, whatever follows its
layers."""

from pathlib import Path

import pytest
import torch

from tests.support.params import slow_but
from tests.support.tiny import ARCHITECTURES, DIFFERENT, save_tiny
from vqllm.calibration.layer_stream import LayerStream
from vqllm.core.distributed import Processes
from vqllm.distillation.cached_predictions import StreamedPredictions
from vqllm.errors import ModelError, NumericalError, OutOfSpaceError
from vqllm.hf.loading import load_model

TOKENS = torch.randint(3, 384, (7, 24), generator=torch.Generator().manual_seed(0))
OTHERS = {"cohere": {"logit_scale": 0.3}, "granite": {"logits_scaling": 3.0}, "xglm": {}}
"""Models that change logits after the head, as gemma2 does, and one whose table of positions is no
parameter."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    return made


def cached(source: Path, folder: Path, **options) -> StreamedPredictions:
    def open_stream() -> LayerStream:
        return LayerStream(source, torch.device("cpu"), torch.bfloat16)

    return StreamedPredictions(open_stream, TOKENS, folder, Processes(), **options)


@pytest.mark.parametrize("arch", slow_but([*DIFFERENT, *OTHERS], [*ARCHITECTURES, *OTHERS]))
def test_it_predicts_as_the_model_does(arch: str, tmp_path: Path, folder: Path) -> None:
    source = save_tiny(tmp_path / "source", arch, num_hidden_layers=3, **OTHERS.get(arch, {}))
    shares: list[float] = []
    teacher = cached(source, folder, report_progress=shares.append)
    assert shares[-1] == 1
    model = load_model(source, dtype=torch.bfloat16)
    for rows in ([0, 1], [5], [6, 2, 0]):
        with torch.no_grad():
            wanted = model(TOKENS[rows], use_cache=False).logits
        got = teacher(TOKENS[rows], use_cache=False).logits
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
    layers = teacher._stream.layers
    assert all(p.is_meta for layer in layers for p in layer.parameters())


def test_it_is_found_again(tmp_path: Path, folder: Path, monkeypatch) -> None:
    source = save_tiny(tmp_path / "source")
    wanted = cached(source, folder)(TOKENS).logits
    run = LayerStream.run

    def none_is_run(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(LayerStream, "run", none_is_run)
    assert torch.equal(cached(source, folder)(TOKENS).logits, wanted)
    file = folder / "teacher-0.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AssertionError):
        cached(source, folder)
    monkeypatch.setattr(LayerStream, "run", run)
    assert torch.equal(cached(source, folder)(TOKENS).logits, wanted)


def test_a_killed_pass_is_made_again(tmp_path: Path, folder: Path, monkeypatch) -> None:
    source = save_tiny(tmp_path / "source")

    def killed(done: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(source, folder, report_progress=killed)
    assert (folder / "teacher-0.bin").is_file()
    model = load_model(source, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(cached(source, folder)(TOKENS).logits, model(TOKENS).logits)


def test_a_sequence_that_it_has_not_seen(tmp_path: Path, folder: Path) -> None:
    teacher = cached(save_tiny(tmp_path / "source"), folder)
    with pytest.raises(ModelError, match="not seen"):
        teacher(TOKENS.flip(1))


def test_an_original_that_is_not_finite(tmp_path: Path, folder: Path) -> None:
    source = save_tiny(tmp_path / "source")
    model = load_model(source)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight.fill_(float("inf"))
    model.save_pretrained(source)
    with pytest.raises(NumericalError, match=r"output of model\.layers\.1 of the original is not"):
        cached(source, folder)


def test_a_full_disk(tmp_path: Path, folder: Path, monkeypatch) -> None:
    source = save_tiny(tmp_path / "source")
    monkeypatch.setattr(
        "vqllm.checkpoint.atomic.shutil.disk_usage", lambda path: type("", (), {"free": 100})
    )
    with pytest.raises(OutOfSpaceError, match=r"needs 0\.0 MB more"):
        cached(source, folder)
