"""JSON of others: what is nested without end, has more values than any model, or is no text, is an
error like any other."""

import json
import stat
from pathlib import Path
from typing import Any

MAX_DEPTH = 100
"""Configurations have about five levels."""
MAX_BYTES, MAX_VALUES = 100_000_000, 3_000_000
"""Of a file, and of values in a text: Python takes 30 bytes and a microsecond for each."""


def loads(text: str | bytes) -> Any:
    """The value that a text means. ValueError says what is wrong with it."""
    marks: tuple[Any, ...] = (",", "[", "{") if isinstance(text, str) else (b",", b"[", b"{")
    if sum(text.count(mark) for mark in marks) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values")
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    # Level by level: whoever walks through the values by recursion does not run out of stack.
    level = [values]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return values
    raise ValueError(f"nested more than {MAX_DEPTH} levels deep")


def read(path: Path) -> Any:
    """The value in a file, in UTF-8. OSError where it cannot be read, ValueError as of `loads`."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):  # a pipe would never end
        raise ValueError("no ordinary file")
    if about.st_size > MAX_BYTES:
        raise ValueError(f"{about.st_size} bytes, more than any such file has")
    return loads(path.read_text(encoding="utf-8"))
