"""Names in the place of local paths, for what may be published.

A folder on somebody's machine is nobody else's business. What a checkpoint says about its origin
therefore has the last part of each path only. Names that are no paths, such as ids of the hub, stay
whole.
"""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

FILES = (".txt", ".md", ".rst", ".raw", ".jsonl", ".json", ".parquet", ".yaml", ".yml", ".gguf")
"""What looks like one of these is a file, also where it is not there any more."""
PIECE = re.compile(r"[^\s,;=\[\]{}()'\"`]+")
CALL = re.compile(r"[\w.]+\(")
STRING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")


def name_of(text: str) -> str:
    """The last part of a local path; any other text as it is."""
    if not is_local(text):
        return text
    path = Path(text).expanduser()
    return path.name if path.name not in ("", "..") else path.absolute().resolve().name or text


def is_local(text: str) -> bool:
    """Whether a text is a path of this machine that says more than a name."""
    path = Path(text)
    if text in (".", "..", "~") or text.startswith("./"):
        return True
    if len(path.parts) < 2:
        return False
    if path.is_absolute() or path.parts[0] == ".." or path.parts[0].startswith("~"):
        return True
    if "=" in path.parts[0]:  # a key and its value
        return False
    return _without_column(path).suffix in FILES or _exists(path)


def _without_column(path: Path) -> Path:
    """`data.jsonl#content` is the column `content` of a file."""
    return path.with_name(path.name.partition("#")[0] or path.name)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a NUL: no path
        return False


def in_text(text: str) -> str:
    """A text with names in place of the paths that it is or has."""
    if is_local(text):
        return name_of(text)
    return PIECE.sub(lambda piece: name_of(piece[0]) if _has_parts(piece[0]) else piece[0], text)


def _has_parts(piece: str) -> bool:
    return "/" in piece or "\\" in piece


def in_values(values: Any) -> Any:
    """JSON values with names in place of the paths in their texts."""
    if isinstance(values, str):
        return in_text(values)
    if isinstance(values, list | tuple):
        return [in_values(value) for value in values]
    if isinstance(values, dict):
        return {key: in_values(value) for key, value in values.items()}
    return values


def in_command(command: str) -> str:
    """A command line, or a call in Python, with names in place of its paths."""
    if CALL.match(command):
        return STRING.sub(lambda string: repr(in_text(ast.literal_eval(string[0]))), command)
    try:
        words = shlex.split(command)
    except ValueError:  # not of a shell
        return in_text(command)
    return shlex.join(map(_in_word, words))


def _in_word(word: str) -> str:
    """A word of a command line: a value, or `--option=value`, or a change `key=value`."""
    key, equals, value = word.partition("=")
    return f"{key}={in_text(value)}" if equals and not _has_parts(key) else in_text(word)
