"""Values out of YAML."""

from pathlib import Path
from typing import Any

import yaml

from vqllm.errors import RecipeError

NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What YAML's parser raises: ValueError for text that is no UTF-8 and for dates such as
2026-13-01."""


MAX_DEPTH, MAX_VALUES = 50, 100_000
"""Far more than any recipe has."""


class _Loader(yaml.SafeLoader):
    """YAML, in which a mapping has each key once. PyYAML itself takes the last without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"the key {key.value!r} comes a second time in line {line}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The value that a text in YAML means; raises one of `NOT_YAML`."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {}, 0)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _size(node: Any, known: dict[int, int], depth: int) -> int:
    """How many values a node stands for, with those that its aliases repeat. YAMLError for more
    than a recipe can have, or for a node that is a part of itself."""
    if depth > MAX_DEPTH:
        raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} levels deep, or without end")
    if id(node) not in known:
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for pair in inner for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_size(part, known, depth + 1) for part in parts)
    if known[id(node)] > MAX_VALUES:
        raise yaml.YAMLError(f"its aliases repeat more than {MAX_VALUES} values")
    return known[id(node)]


def read_yaml(file: Path) -> Any:
    """The value that a file means; RecipeError if it cannot be read or is not YAML."""
    try:
        return parse_yaml(file.read_text(encoding="utf-8"))
    except NOT_YAML as error:
        raise RecipeError(f"{file} is not YAML: {error}") from error
    except OSError as error:
        raise RecipeError(f"{file} cannot be read: {error}") from error
