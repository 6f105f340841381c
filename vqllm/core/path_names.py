"""Names that no file can have, or that libraries below cannot open."""

import os
from pathlib import Path

MAX_BYTES = 255
"""Of one part of a path, on every file system in use."""


def problem(path: str | Path) -> str | None:
    """Why nothing can be read from or written to this path; None if it can."""
    text = os.fspath(path)
    if "\0" in text:
        return "its name has a NUL character"
    try:
        parts = [part.encode() for part in Path(text).parts]
    except UnicodeEncodeError:
        return "its name is not UTF-8, which the libraries that read and write models need"
    longest = max(map(len, parts), default=0)
    if longest > MAX_BYTES:
        return f"a part of its name has {longest} bytes; {MAX_BYTES} are allowed"
    return None


def shown(path: str | Path) -> str:
    """A path for messages: on one line, and not long."""
    text = os.fspath(path).encode(errors="replace").decode()
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}"
