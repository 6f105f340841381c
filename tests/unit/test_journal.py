"""The journal: what a killed run goes on with, and what it refuses to go on with."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny import save_tiny
from vqllm.checkpoint import atomic
from vqllm.checkpoint.reader import Checkpoint
from vqllm.checkpoint.resume.journal import (
    FinishedLayer,
    Journal,
    fingerprint,
    identity,
    is_unfinished,
)
from vqllm.errors import CheckpointError

IDENTITY = {"recipe": {"seed": 0, "parts": [{"type": "a"}, {"type": "b"}]}, "model": "m"}


def write_layer(journal: Journal, folder: Path, number: int) -> FinishedLayer:
    shard = f"shard-{number}.safetensors"
    digest = atomic.write_shard(folder / shard, {"x": torch.full((9,), number)}, journal.staging)
    layer = FinishedLayer(
        layer=number,
        shard=shard,
        sha256=digest,
        linears={f"layers.{number}.q": {"rows": 3, "cols": 3}},
        records=[{"name": f"layers.{number}.q", "proxy_loss": 0.5}],
    )
    journal.append(layer)
    return layer


@pytest.fixture
def begun(tmp_path: Path) -> tuple[Path, list[FinishedLayer]]:
    """A run with three finished layers, its process gone."""
    folder = tmp_path / "out"
    journal = Journal(folder, IDENTITY)
    assert journal.finished == []
    layers = [write_layer(journal, folder, i) for i in range(3)]
    journal.close()
    return folder, layers


def path_of(folder: Path) -> Path:
    return folder / ".vqllm" / "journal.jsonl"


def test_goes_on_from_the_last_finished_layer(begun: tuple[Path, list[FinishedLayer]]) -> None:
    folder, layers = begun
    assert is_unfinished(folder)
    journal = Journal(folder, IDENTITY)
    assert journal.finished == layers
    fourth = write_layer(journal, folder, 3)
    journal.close()
    assert Journal(folder, IDENTITY).finished == [*layers, fourth]


def test_journal_is_the_same_bytes_after_a_resume(begun: tuple[Path, list[FinishedLayer]]) -> None:
    folder, _ = begun
    before = path_of(folder).read_bytes()
    Journal(folder, IDENTITY).close()
    assert path_of(folder).read_bytes() == before


def test_killed_while_writing_the_last_line(begun: tuple[Path, list[FinishedLayer]]) -> None:
    folder, layers = begun
    whole = path_of(folder).read_bytes()
    start = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    for length in range(start, len(whole), 7):
        path_of(folder).write_bytes(whole[:length])
        journal = Journal(folder, IDENTITY)
        assert journal.finished == layers[:2]
        write_layer(journal, folder, 2)
        journal.close()
        assert path_of(folder).read_bytes() == whole


def test_last_line_of_zeros_after_a_power_cut(begun: tuple[Path, list[FinishedLayer]]) -> None:
    folder, layers = begun
    with path_of(folder).open("ab") as file:
        file.write(b"\0" * 100 + b"\n")
    assert Journal(folder, IDENTITY).finished == layers


def test_damage_in_the_middle_is_refused(begun: tuple[Path, list[FinishedLayer]]) -> None:
    folder, _ = begun
    lines = path_of(folder).read_bytes().splitlines(keepends=True)
    path_of(folder).write_bytes(b"".join([lines[0], b"{\n", *lines[2:]]))
    with pytest.raises(CheckpointError, match=r"line 2 of .*journal\.jsonl is damaged"):
        Journal(folder, IDENTITY)


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_layers_from_a_damaged_shard_on_are_done_again(
    damage: str, begun: tuple[Path, list[FinishedLayer]], caplog: pytest.LogCaptureFixture
) -> None:
    folder, layers = begun
    shard = folder / layers[1].shard
    shard.unlink() if damage == "missing" else shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with caplog.at_level(logging.WARNING):
        journal = Journal(folder, IDENTITY)
    assert journal.finished == layers[:1]
    assert layers[1].shard in caplog.text
    assert "layers from 1 on are done again" in caplog.text
    write_layer(journal, folder, 1)
    journal.close()
    assert Journal(folder, IDENTITY).finished == layers[:2]


@pytest.mark.parametrize("line", [b"{}", b"[1]"])
def test_a_line_that_is_no_layer_is_refused(
    line: bytes, begun: tuple[Path, list[FinishedLayer]]
) -> None:
    path = path_of(begun[0])
    lines = path.read_bytes().splitlines()
    lines[2] = line
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(CheckpointError, match=r"line 3 of .* is damaged"):
        Journal(begun[0], IDENTITY)


def test_an_empty_journal_beside_layers_is_refused(begun: tuple[Path, list[FinishedLayer]]) -> None:
    path_of(begun[0]).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is empty, but .* holds shard-0"):
        Journal(begun[0], IDENTITY)


@pytest.mark.parametrize("name", ["file/x", "x" * 300])
def test_folders_that_cannot_be_made(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be an output folder"):
        Journal(tmp_path / name, IDENTITY)


def test_another_run_is_refused_with_every_difference(
    begun: tuple[Path, list[FinishedLayer]],
) -> None:
    folder, layers = begun
    other = {"recipe": {"seed": 1, "parts": [{"type": "a"}, {"type": "c"}]}, "extra": True}
    with pytest.raises(CheckpointError) as caught:
        Journal(folder, other)
    lines = str(caught.value).splitlines()
    assert lines[1:-1] == [
        "  extra: (absent) → true",
        '  model: "m" → (absent)',
        '  recipe.parts.1.type: "b" → "c"',
        "  recipe.seed: 0 → 1",
    ]
    assert "To start over, delete" in lines[-1]
    assert Journal(folder, IDENTITY).finished == layers


def test_two_processes_do_not_share_a_folder(begun: tuple[Path, list[FinishedLayer]]) -> None:
    folder, _ = begun
    first = Journal(folder, IDENTITY)
    with pytest.raises(CheckpointError, match="another process is writing"):
        Journal(folder, IDENTITY)
    first.close()
    Journal(folder, IDENTITY).close()


def test_folder_with_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"is not empty: thesis\.tex\. The output must be"):
        Journal(tmp_path, IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(CheckpointError, match="Not a directory"):
        Journal(tmp_path / "thesis.tex", IDENTITY)


def test_empty_folder_and_a_start_that_was_killed_at_once(tmp_path: Path) -> None:
    (tmp_path / ".vqllm").mkdir()
    (tmp_path / ".vqllm" / "journal.jsonl.part").write_bytes(b'{"rec')
    assert Journal(tmp_path, IDENTITY).finished == []


def test_completion_leaves_the_checkpoint_only(begun: tuple[Path, list[FinishedLayer]]) -> None:
    folder, layers = begun
    journal = Journal(folder, IDENTITY)
    (journal.staging / "offload").mkdir()
    (journal.staging / "offload" / "states.bin").touch()
    (journal.staging / "tokens.safetensors").touch()
    (folder / "config.json").write_text('{"quantization_config": {}}')
    journal.complete()
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", *(layer.shard for layer in layers)}
    with pytest.raises(CheckpointError, match="holds a finished checkpoint"):
        Journal(folder, IDENTITY)


def test_killed_at_completion_a_run_is_finished(
    begun: tuple[Path, list[FinishedLayer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, layers = begun
    journal = Journal(folder, IDENTITY)
    (journal.staging / "states").mkdir()
    (folder / "config.json").write_text('{"quantization_config": {}}')

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            journal.complete()
    assert (folder / ".vqllm" / "states").is_dir()
    with pytest.raises(CheckpointError, match="holds a finished checkpoint"):
        Journal(folder, IDENTITY)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", *(layer.shard for layer in layers)}


def test_unfinished_run_is_no_checkpoint(begun: tuple[Path, list[FinishedLayer]]) -> None:
    with pytest.raises(CheckpointError, match=r"unfinished run\. Repeat the command"):
        Checkpoint.open(begun[0])


@pytest.fixture(scope="module")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "source")


@pytest.fixture
def source(tiny_source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_source, tmp_path / "source"))


def run_identity(source: Path, **changes: Any) -> dict[str, Any]:
    values = {"model": "m", "recipe": {"seed": 0}, "settings": {"device": "cpu"}, **changes}
    return identity(source=source, **values)


def test_identity_survives_json_and_copying(source: Path, tmp_path: Path) -> None:
    first = run_identity(source)
    assert json.loads(json.dumps(first)) == first
    copy = shutil.copytree(source, tmp_path / "copy")
    assert run_identity(Path(copy)) == first


@pytest.mark.parametrize(
    "changes", [{"model": "n"}, {"recipe": {"seed": 1}}, {"settings": {"device": "cuda"}}]
)
def test_identity_depends_on_its_arguments(changes: dict[str, Any], source: Path) -> None:
    assert run_identity(source) != run_identity(source, **changes)


def test_fingerprint_tells_a_retrained_model_of_the_same_size(source: Path) -> None:
    before = fingerprint(source)
    weights = source / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-(len(data) // 2) :] = bytes(byte ^ 1 for byte in data[-(len(data) // 2) :])
    weights.write_bytes(data)
    after = fingerprint(source)
    assert {key for key in before if before[key] != after[key]} == {"model.safetensors"}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_fingerprint_covers_small_files(name: str, source: Path) -> None:
    before = fingerprint(source)
    (source / name).write_text((source / name).read_text() + "\n")
    assert fingerprint(source)[name] != before[name]


def test_fingerprint_ignores_what_is_not_copied(source: Path) -> None:
    before = fingerprint(source)
    for name in ("README.md", "pytorch_model.bin", "modeling.py"):
        (source / name).touch()
    assert fingerprint(source) == before
    assert set(fingerprint(source, trust_remote_code=True)) == {*before, "modeling.py"}


def test_a_run_that_kept_nothing_gives_way_to_another(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    Journal(folder, IDENTITY).close()
    other = {**IDENTITY, "recipe": {"seed": 1}}
    journal = Journal(folder, other)
    write_layer(journal, folder, 0)
    journal.close()
    assert len(Journal(folder, other).finished) == 1
    with pytest.raises(CheckpointError, match=r"recipe\.seed: 1 → 0"):
        Journal(folder, IDENTITY)


@pytest.mark.parametrize("name", ["shard.safetensors", ".vqllm/sequences.safetensors"])
def test_a_run_that_kept_something_does_not(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    Journal(folder, IDENTITY).close()
    (folder / name).write_text("kept")
    with pytest.raises(CheckpointError, match="unfinished run that differs"):
        Journal(folder, {**IDENTITY, "recipe": {"seed": 1}})


def test_what_is_rounded_is_not_taken_by_a_run_of_another_model(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    Journal(folder, IDENTITY).close()
    (folder / ".vqllm" / "rounded").mkdir()
    Journal(folder, {**IDENTITY, "recipe": {"seed": 1}}).close()
    with pytest.raises(CheckpointError, match='model: "m" → "n"'):
        Journal(folder, {**IDENTITY, "model": "n"})
