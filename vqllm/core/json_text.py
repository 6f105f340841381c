"""JSON of others: what is nested without end, or is no text, is an error like any other."""

import json
from pathlib import Path
from typing import Any

MAX_DEPTH = 100
"""Configurations have about five levels."""


def loads(text: str | bytes) -> Any:
    """The value that a text means. ValueError says what is wrong with it."""
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
    return loads(path.read_text(encoding="utf-8"))
