"""Values out of YAML."""

from pathlib import Path
from typing import Any

import yaml

from vqllm.errors import RecipeError

NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What YAML's parser raises: ValueError for text that is no UTF-8 and for dates such as
2026-13-01."""


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
    return yaml.load(text, _Loader)


def read_yaml(file: Path) -> Any:
    """The value that a file means; RecipeError if it cannot be read or is not YAML."""
    try:
        return parse_yaml(file.read_text(encoding="utf-8"))
    except NOT_YAML as error:
        raise RecipeError(f"{file} is not YAML: {error}") from error
    except OSError as error:
        raise RecipeError(f"{file} cannot be read: {error}") from error
