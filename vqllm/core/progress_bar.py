"""Progress on a terminal: a bar with layer, linear, proxy loss and time left."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from vqllm.core.progress import Clock, LogProgress, Phase, duration, layer_line
from vqllm.core.progress import Progress as Watcher
from vqllm.core.protocols import JSON


@contextmanager
def progress_for(console: Console) -> Iterator[Watcher]:
    """A bar on a terminal, a line per layer elsewhere."""
    if not console.is_terminal:
        yield LogProgress()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[done]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    root = logging.getLogger()
    handlers = root.handlers
    # Log lines through the same console, above the bar instead of through it.
    root.handlers = [RichHandler(console=console, show_time=False, show_path=False)]
    try:
        with Progress(*columns, console=console, transient=True) as bar:
            yield BarProgress(bar)
    finally:
        root.handlers = handlers


class BarProgress:
    """A rich progress bar over the layers; a line for each layer stays above it."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._clock = Clock()
        self._phase = Phase("")
        self._task: TaskID | None = None
        self._share_task: TaskID | None = None

    def phase(self, text: str) -> None:
        self._bar.console.print(text, highlight=False)
        self._phase = Phase(text)
        self._end_share()

    def share(self, done: float) -> None:
        if self._share_task is None:
            self._share_task = self._bar.add_task(self._phase.text, total=1, done="", left="")
        left = self._phase.left(done)
        self._bar.update(self._share_task, completed=done, done=f"{100 * done:.0f} %", left=left)

    def _end_share(self) -> None:
        if self._share_task is not None:
            self._bar.remove_task(self._share_task)
            self._share_task = None

    def layers(self, num_layers: int, num_finished: int) -> None:
        self._clock.start(num_layers, num_finished)
        self._num_layers = num_layers
        self._end_share()
        if self._task is not None:  # of the run before this one
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task("layers", total=num_layers, done="", left="")

    def linear(self, record: JSON) -> None:
        assert self._task is not None, "layers() comes first"
        name = ".".join(record["name"].split(".")[-3:])
        self._bar.update(self._task, description=f"{name} {record['proxy_loss']:.4g}")

    def layer(self, index: int, records: list[JSON]) -> None:
        assert self._task is not None, "layers() comes first"
        seconds_left = self._clock.finish_one(index)
        left = "" if seconds_left != seconds_left else f"{duration(seconds_left)} left"
        done = f"{index + 1}/{self._num_layers} layers"
        self._bar.update(self._task, completed=index + 1, done=done, left=left)
        self._bar.console.print(layer_line(index, records, float("nan")), highlight=False)
