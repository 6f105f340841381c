"""What a long run tells whoever watches it."""

import logging

import pytest
from rich.progress import Progress

from vqllm.core import progress as progress_module
from vqllm.core.progress import LogProgress
from vqllm.core.progress_bar import BarProgress


def test_a_long_phase_has_a_line_from_time_to_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    progress = LogProgress()
    with caplog.at_level(logging.INFO, "vqllm"):
        progress.phase("gradients")
        for done in range(1, 11):
            now += 10
            progress.share(done / 10)
    assert [record.message for record in caplog.records] == [
        "gradients",
        "gradients: 30 %, 1m10s left",
        "gradients: 60 %, 40s left",
        "gradients: 90 %, 10s left",
    ]


def test_the_bar_of_a_phase_goes_with_it() -> None:
    with Progress(disable=True) as bar:
        progress = BarProgress(bar)
        progress.phase("gradients")
        progress.share(0.25)
        progress.share(0.5)
        assert [(task.description, task.completed) for task in bar.tasks] == [("gradients", 0.5)]
        progress.layers(3, 0)
        assert [task.description for task in bar.tasks] == ["layers"]
        progress.phase("the rest")
        assert [task.description for task in bar.tasks] == ["layers"]
