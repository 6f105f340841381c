"""Seeded damage to files: bits, lengths, JSON values, headers of safetensors, whole files.

The same seed does the same. Values are those that break readers: wrong types, huge and negative
numbers, deep nesting, long strings, names with other characters.
"""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DEPTH = 3000
"""Of a nested list; Python's own limit of recursion is 1000."""


def nested() -> Any:
    value: Any = []
    for _ in range(DEPTH):
        value = [value]
    return value


VALUES: Sequence[Callable[[], Any]] = (
    lambda: None,
    lambda: True,
    lambda: 0,
    lambda: -1,
    lambda: 3,
    lambda: 2**31,
    lambda: 2**63,
    lambda: -(10**30),
    lambda: 0.5,
    lambda: 1e308,
    lambda: "",
    lambda: "x",
    lambda: "é\n|`" * 100,
    lambda: "../../outside",
    lambda: [],
    lambda: {},
    lambda: [[1, "a"], {}],
    nested,
)


def damage(folder: Path, rng: random.Random) -> set[str]:
    """Damage one or two files of a folder; the names of those that changed."""
    changed = set()
    for _ in range(rng.choice((1, 1, 2))):
        files = sorted(file for file in folder.iterdir() if file.is_file())
        file = rng.choice(files)
        changed.add(file.name)
        kinds = [flip, zero, truncate, append, remove, empty]
        if file.suffix == ".json":
            kinds += [edit_json] * 8
        if file.suffix == ".safetensors":
            kinds += [edit_header] * 6
        if len(files) > 1:
            kinds.append(lambda own, r, others=files: changed.add(exchange(own, r, others)))
        rng.choice(kinds)(file, rng)
    return changed


def flip(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 3)) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def zero(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((1, 8, 1000)))
    data[start:end] = bytes(end - start)
    file.write_bytes(data)


def truncate(file: Path, rng: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data) + 1)])


def append(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() + rng.choice((b"\0", b"}", b"\xff" * 9, b"\n\n")))


def remove(file: Path, rng: random.Random) -> None:
    file.unlink()


def empty(file: Path, rng: random.Random) -> None:
    file.write_bytes(b"")


def exchange(file: Path, rng: random.Random, files: Sequence[Path]) -> str:
    """Put another file in its place; the name of the other one, which is gone half of the times."""
    others = [own for own in files if own != file and own.is_file()]
    other = rng.choice(others)
    if rng.random() < 0.5:
        other.replace(file)
    else:
        shutil.copyfile(other, file)
    return other.name


def edit_json(file: Path, rng: random.Random) -> None:
    """Change a value somewhere in a file of JSON."""
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return flip(file, rng)
    file.write_text(text_of(edit(values, rng)))
    return None


def edit_header(file: Path, rng: random.Random) -> None:
    """Change a value in the header of a safetensors file, whose length stays right."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return flip(file, rng)
    text = text_of(edit(header, rng)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return None


def edit(values: Any, rng: random.Random) -> Any:
    """A copy of JSON values with one of them removed, replaced, renamed, moved by one or repeated;
    deeper ones are as likely as those at the top."""
    places: list[tuple[Any, Any]] = []
    copy = json.loads(json.dumps(values))
    waiting = [copy]
    while waiting:
        value = waiting.pop()
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            places.append((value, key))
            if isinstance(value[key], (dict, list)):
                waiting.append(value[key])
    if not places:
        return rng.choice(VALUES)()
    # As likely to be one of the few near the top as one of the many below.
    parent, key = rng.choice(places[: rng.choice((5, 50, len(places)))])
    old = parent[key]
    kind = rng.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[f"{key}2"] = parent.pop(key)
    elif kind == 2 and type(old) in (int, float):
        parent[key] = old + rng.choice((-1, 1))
    elif kind == 3 and isinstance(old, (list, dict)):
        parent[key] = old * 2 if isinstance(old, list) else list(old)
    else:
        parent[key] = rng.choice(VALUES)()
    return copy


def text_of(values: Any) -> str:
    """JSON, of any depth: the encoder of the standard library gives up at a thousand."""
    deep = "[" * DEPTH + "]" * DEPTH

    def shallow(value: Any) -> Any:
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
            depth, inner = 0, value
            while isinstance(inner, list) and len(inner) == 1:
                depth, inner = depth + 1, inner[0]
            if depth > 100:
                return "NESTED"
        if isinstance(value, list):
            return [shallow(own) for own in value]
        if isinstance(value, dict):
            return {key: shallow(own) for key, own in value.items()}
        return value

    return json.dumps(shallow(values)).replace('"NESTED"', deep)
