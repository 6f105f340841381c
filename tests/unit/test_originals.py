"""Where a checkpoint's original lies is known on this machine, for copies of the checkpoint too."""

from pathlib import Path

import pytest

from vqllm.checkpoint.format import INDEX
from vqllm.runs.originals import recall, remember


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
