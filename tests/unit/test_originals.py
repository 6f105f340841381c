"""Where a checkpoint's original lies is known on this machine, for copies of the checkpoint too."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vqllm.checkpoint.format import INDEX
from vqllm.runs.originals import recall, remember
from vqllm.runs.teacher_check import teacher_of


def test_each_place_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQLLM_CACHE", str(tmp_path / "cache"))
    places = [tmp_path / name for name in ("one", "two", "copy", "other")]
    for place in places:
        place.mkdir()
        (place / INDEX).write_text("other" if place.name == "other" else "equal")
    one, two, copy, other = places
    assert recall(one) is None
    remember(one, "/models/a", "a command", {})
    assert recall(one) == recall(copy) == "/models/a"
    remember(two, "/models/b", "a command", {})
    assert recall(one) == "/models/a"
    assert recall(two) == "/models/b"
    assert recall(copy) in ("/models/a", "/models/b")
    assert recall(other) is None


def test_a_part_of_a_run_knows_its_original_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VQLLM_CACHE", str(tmp_path / "cache"))
    part, equal = tmp_path / "part", tmp_path / "equal"
    for folder in (part, equal):
        folder.mkdir()
        (folder / INDEX).write_text("{}")
    remember(equal, "/gone", "", {})
    for named, found in ((str(tmp_path), str(tmp_path)), ("name", "/gone"), ("/moved", "/gone")):
        extra = {"source": {"model": named}}
        checkpoint: Any = SimpleNamespace(folder=part, quantization=SimpleNamespace(extra=extra))
        assert teacher_of(checkpoint) == found
