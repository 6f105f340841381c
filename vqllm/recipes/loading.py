"""Recipes out of files, shipped ones by name, and dictionaries, with `key=value` changes."""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from vqllm.core.protocols import JSON
from vqllm.core.registry import unknown
from vqllm.errors import RecipeError
from vqllm.recipes.schema import RECIPE_VERSION, Recipe, TuningRecipe, mistakes
from vqllm.recipes.shipped import available, available_tuning

R = TypeVar("R", Recipe, TuningRecipe)


def from_dict(values: JSON, origin: str) -> Recipe:
    """Validate a recipe; RecipeError names each wrong key with its place."""
    return _validated(Recipe, values, origin)


def tuning_from_dict(values: JSON, origin: str) -> TuningRecipe:
    """The same for a recipe of `vqllm tune`."""
    return _validated(TuningRecipe, values, origin)


def _validated(kind: type[R], values: JSON, origin: str) -> R:
    if not isinstance(values, dict):
        raise RecipeError(f"{origin} holds {type(values).__name__}, expected a mapping of keys")
    version = values.get("version", RECIPE_VERSION)
    if version != RECIPE_VERSION:
        raise RecipeError(
            f"{origin} has recipe version {version!r}; this vqllm reads version {RECIPE_VERSION}. "
            "Install a newer vqllm, or write the recipe in the version it reads."
        )
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{origin} is not a valid recipe:\n{_explain(error)}") from error


def load(name_or_file: str | Path, changes: tuple[str, ...] = ()) -> Recipe:
    """A recipe by name (shipped) or file, with `key=value` changes applied before validation.

    Args:
        name_or_file: a name that `available` lists, or a path to a YAML file.
        changes: `dotted.key=value`, the value in YAML; list items by their index.
    """
    return from_dict(_read(name_or_file, available(), "recipe", changes), str(name_or_file))


def load_tuning(name_or_file: str | Path, changes: tuple[str, ...] = ()) -> TuningRecipe:
    """The same for a recipe of `vqllm tune`."""
    values = _read(name_or_file, available_tuning(), "tuning recipe", changes)
    return tuning_from_dict(values, str(name_or_file))


def _read(
    name_or_file: str | Path, shipped: dict[str, Path], kind: str, changes: tuple[str, ...]
) -> Any:
    path = Path(name_or_file)
    if str(name_or_file) in shipped:
        path = shipped[str(name_or_file)]
    elif not path.is_file():
        message = unknown(kind, str(name_or_file), list(shipped))
        raise RecipeError(f"{message} A path to a YAML file works too; there is no such file.")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except NOT_YAML as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    if isinstance(values, dict):
        for change in changes:
            _apply(values, change)
    return values


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


NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What YAML's parser raises: ValueError for text that is no UTF-8 and for dates such as
2026-13-01."""


def parse_yaml(text: str) -> Any:
    """The value that a text in YAML means; raises one of `NOT_YAML`."""
    return yaml.load(text, _Loader)


def _apply(values: JSON, change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {change!r}: expected key=value, for example hessian.damping=0.02")
    try:
        value = parse_yaml(text)
    except NOT_YAML as error:
        raise RecipeError(f"--set {change!r}: the value is not YAML: {error}") from error
    *parents, last = key.split(".")
    place: Any = values
    for part in parents:
        if isinstance(place, list) and part.isdigit() and int(part) < len(place):
            place = place[int(part)]
        elif isinstance(place, dict):
            place = place.setdefault(part, {})
        else:
            raise RecipeError(f"--set {change!r}: {part!r} leads nowhere in this recipe")
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise RecipeError(f"--set {change!r}: {last!r} leads nowhere in this recipe")


def _explain(error: ValidationError) -> str:
    return "\n".join(f"  {line}" for line in mistakes(error))
