"""Progress of a long run: its events, and one line of log for each."""

import logging
import time
from typing import Protocol

from vqllm.core.protocols import JSON

logger = logging.getLogger("vqllm")


class Progress(Protocol):
    """Receives the events of a run, in order."""

    def phase(self, text: str) -> None:
        """A new phase of the run begins."""
        ...

    def share(self, done: float) -> None:
        """A share of the phase is done, from 0 to 1. Not every phase reports its share."""
        ...

    def layers(self, num_layers: int, num_finished: int) -> None:
        """The loop over layers begins; some are finished from an earlier run."""
        ...

    def linear(self, record: JSON) -> None:
        """A linear is quantized."""
        ...

    def layer(self, index: int, records: list[JSON]) -> None:
        """A layer is written (or, on resume, skipped because it was written before)."""
        ...


class NoProgress:
    """Says nothing: of a process that works for another one."""

    def phase(self, text: str) -> None:
        pass

    def share(self, done: float) -> None:
        pass

    def layers(self, num_layers: int, num_finished: int) -> None:
        pass

    def linear(self, record: JSON) -> None:
        pass

    def layer(self, index: int, records: list[JSON]) -> None:
        pass


class LogProgress:
    """One line per phase and per layer through `logging`, and in long phases one every 30 seconds;
    the default in Python."""

    def __init__(self) -> None:
        self._clock = Clock()
        self._phase = Phase("")

    def phase(self, text: str) -> None:
        logger.info(text)
        self._phase = Phase(text)

    def share(self, done: float) -> None:
        if self._phase.is_due(SECONDS_BETWEEN_LINES):
            logger.info(self._phase.line(done))

    def layers(self, num_layers: int, num_finished: int) -> None:
        self._clock.start(num_layers, num_finished)

    def linear(self, record: JSON) -> None:
        pass

    def layer(self, index: int, records: list[JSON]) -> None:
        logger.info(layer_line(index, records, self._clock.finish_one(index)))


SECONDS_BETWEEN_LINES = 30.0


class Phase:
    """A phase of a run, with the time of its start and of its last line."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._start = self._last_line = time.monotonic()

    def is_due(self, seconds: float) -> bool:
        """Whether the last line is at least `seconds` ago; a yes counts as a line."""
        now = time.monotonic()
        due = now - self._last_line >= seconds
        if due:
            self._last_line = now
        return due

    def line(self, done: float) -> str:
        """The share that is done and the time left."""
        return f"{self.text}: {100 * done:.0f} %, {self.left(done)}"

    def left(self, done: float) -> str:
        """The time left, at the mean speed so far."""
        seconds = (time.monotonic() - self._start) * (1 - done) / max(done, 1e-3)
        return f"{duration(seconds)} left"


class Clock:
    """Time left, from the mean time of the layers done in this run."""

    def start(self, num_layers: int, num_finished: int) -> None:
        self._num_layers = num_layers
        self._num_finished = num_finished
        self._start = time.monotonic()

    def finish_one(self, index: int) -> float:
        """Seconds left after layer `index`."""
        num_done = index + 1 - self._num_finished
        if num_done <= 0:
            return float("nan")
        return (time.monotonic() - self._start) / num_done * (self._num_layers - index - 1)


def layer_line(index: int, records: list[JSON], seconds_left: float) -> str:
    """One line about a finished layer: mean proxy loss, its worst linear, time left."""
    if not records:
        return f"layer {index}: nothing quantized"
    worst = max(records, key=lambda record: record["proxy_loss"])
    mean = sum(record["proxy_loss"] for record in records) / len(records)
    left = "" if seconds_left != seconds_left else f", {duration(seconds_left)} left"
    name = ".".join(worst["name"].split(".")[-2:])
    return (
        f"layer {index}: {len(records)} linears, mean proxy loss {mean:.4g}, "
        f"worst {name} {worst['proxy_loss']:.4g}{left}"
    )


def duration(seconds: float) -> str:
    """Seconds in the units that a person reads: 42s, 3m20s, 2h05m."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    return f"{total // 3600}h{total % 3600 // 60:02d}m"
