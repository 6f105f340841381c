"""Archives: the same bytes again, and fewer of them where values are not spread evenly."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.support.fake_checkpoint import fake_checkpoint
from vqllm.archive import archive, container, unarchive
from vqllm.archive.coding import decoded, encoded, fitted
from vqllm.archive.views import View, views_of
from vqllm.errors import CheckpointError
from vqllm_kernels.uniform.spec import UniformSpec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with weights of several kinds: dense, empty, a number, and codes of three bits."""
    made = tmp_path / "model"
    (made / "more").mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "more/chat.jinja").write_text("hello " * 1000)
    generator = np.random.default_rng(0)
    codes = np.clip(np.rint(generator.normal(3.5, 1.2, (256, 512))), 0, 7).astype(np.uint16)
    packed = View("packed", 3).bytes([codes], 192)
    tensors = {
        "a.codes": torch.from_numpy(packed),
        "a.scale": torch.rand(256, 24).half(),
        "b.codes": torch.randint(-(1 << 15), 1 << 15, (8, 64, 32), dtype=torch.int16),
        "c.weight": torch.randn(300, 512).bfloat16(),
        "d.weight": torch.zeros(0, 4),
        "e.weight": torch.tensor(3.5),
        "f.weight": torch.arange(100),
    }
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    return made


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_the_folder_comes_back_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    made = archive(folder, tmp_path / "model.vqa")
    unarchive(tmp_path / "model.vqa", tmp_path / "again")
    assert files(tmp_path / "again") == files(folder)
    assert made.after == (tmp_path / "model.vqa").stat().st_size < made.before
    # Three bits of values with an entropy of 2.3; sign and exponent of bfloat16; nothing of codes
    # that are spread evenly.
    before, after = made.kinds["weight"]
    assert after < 0.75 * before
    before, after = made.kinds["codes"]
    assert before - 0.26 * 49152 < after < before - 0.2 * 49152


def test_the_same_folder_gives_the_same_archive(folder: Path, tmp_path: Path) -> None:
    archive(folder, tmp_path / "one")
    archive(folder, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_blocks_of_rows_fit_together(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vqllm.archive.tensors.MOST_BYTES", 5000)
    archive(folder, tmp_path / "model.vqa")
    unarchive(tmp_path / "model.vqa", tmp_path / "again")
    assert files(tmp_path / "again") == files(folder)


def test_a_quantized_checkpoint_loads_as_before(tmp_path: Path) -> None:
    from vqllm.checkpoint.reader import Checkpoint

    made = fake_checkpoint(tmp_path, format=UniformSpec(bits=3, group=16)).folder
    archive(made, tmp_path / "model.vqa")
    unarchive(tmp_path / "model.vqa", tmp_path / "again")
    assert files(tmp_path / "again") == files(made)
    Checkpoint.open(tmp_path / "again", verify=True)


@pytest.mark.parametrize("item_bytes", [1, 2, 4])
@pytest.mark.parametrize("is_float", [False, True])
def test_views_are_exact_or_do_not_apply(item_bytes: int, is_float: bool) -> None:
    generator = np.random.default_rng(1)
    data = generator.integers(0, 256, (5, 60), dtype=np.uint8)
    applied = 0
    for view in views_of(item_bytes, is_float):
        streams = view.symbols(data)
        if streams is None:
            assert 8 * 60 % view.width
            continue
        applied += 1
        assert [stream.shape[1] for stream in streams] == view.num_symbols(60)
        assert (view.bytes(streams, 60) == data).all()
    assert applied


@pytest.mark.parametrize("by", ["rows", "columns", "groups"])
def test_values_of_two_widths_take_what_their_entropies_say(by: str) -> None:
    """A fifth of the rows, columns or groups are wide, the others narrow; a single histogram takes
    what the mixture says. Classes of equal size, with which the search begins, do not fit."""
    generator = np.random.default_rng(2)
    wide = generator.random((512, 16)) < 0.2
    if by == "rows":
        wide[:] = wide[:, :1]
    spread = np.repeat(wide, 64, axis=1)
    if by == "columns":
        spread[:] = generator.random(1024) < 0.2
    sigma = np.where(spread, 3.0, 0.6)
    symbols = np.clip(np.rint(8 + sigma * generator.normal(size=sigma.shape)), 0, 15)
    symbols = symbols.astype(np.uint16)
    ideal = sum(_entropy(symbols[spread == own]) * (spread == own).sum() for own in (False, True))
    mixture = _entropy(symbols) * symbols.size
    about, data = encoded(symbols, fitted(symbols))
    assert (decoded(about, data, *symbols.shape) == symbols).all()
    assert ideal * 0.99 < 8 * len(data) < ideal + 0.12 * (mixture - ideal)


def _entropy(symbols: np.ndarray) -> float:
    counts = np.bincount(symbols.reshape(-1))
    p = counts[counts > 0] / symbols.size
    return float(-(p * np.log2(p)).sum())


@pytest.mark.parametrize("symbols", [np.zeros((3, 5)), np.full((1, 1), 65535), np.eye(40)])
def test_few_symbols_come_back(symbols: np.ndarray) -> None:
    symbols = symbols.astype(np.uint16)
    about, data = encoded(symbols, fitted(symbols))
    assert (decoded(about, data, *symbols.shape) == symbols).all()


def test_any_byte_that_is_damaged_is_noticed(folder: Path, tmp_path: Path) -> None:
    archive(folder, tmp_path / "model.vqa")
    whole = (tmp_path / "model.vqa").read_bytes()
    before = files(folder)
    for at in range(20, len(whole), len(whole) // 60):
        (tmp_path / "bad.vqa").write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
        out = tmp_path / f"out-{at}"
        try:
            unarchive(tmp_path / "bad.vqa", out)
        except CheckpointError:
            assert not out.exists()
        else:  # dates and the like: bytes of the container that mean nothing
            assert files(out) == before
    for at in (0, 10, len(whole) // 2, len(whole) - 5):
        (tmp_path / "bad.vqa").write_bytes(whole[:at])
        with pytest.raises(CheckpointError, match="no archive, or damaged"):
            unarchive(tmp_path / "bad.vqa", tmp_path / "out")


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.vqa"
    archive(folder, file)
    with pytest.raises(CheckpointError, match="is there already"):
        archive(folder, file)
    with pytest.raises(CheckpointError, match="not empty"):
        unarchive(file, folder)
    with pytest.raises(CheckpointError, match="there is no file"):
        unarchive(tmp_path / "none", tmp_path / "out")
    with pytest.raises(CheckpointError, match="there is no folder"):
        archive(tmp_path / "none", tmp_path / "new")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="weights are missing"):
        archive(tmp_path / "empty", tmp_path / "new")
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="safetensors"):
        archive(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "newer than 1"),
        ({"format": "zoo"}, "no archive of this kind"),
        ({"files": {"../outside": {"bytes": 1, "sha256": ""}}}, "outside its folder"),
        ({"files": {"/outside": {"bytes": 1, "sha256": ""}}}, "outside its folder"),
        ({"files": {"missing": {"bytes": 1, "sha256": ""}}}, "damaged"),
        ({"files": 3}, "damaged"),
    ],
)
def test_archives_of_others_are_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    about = {"format": container.FORMAT, "version": 1, "files": {}, **change}
    with zipfile.ZipFile(tmp_path / "made.vqa", "w") as made:
        made.writestr(container.ABOUT, json.dumps(about))
    with pytest.raises(CheckpointError, match=message):
        unarchive(tmp_path / "made.vqa", tmp_path / "out")
    assert not (tmp_path / "out").exists()
