"""Recipes out of files, shipped ones by name, and dictionaries, with `key=value` changes."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vqllm.core.protocols import JSON
from vqllm.errors import RecipeError
from vqllm.recipes.bases import merged_over_base, read
from vqllm.recipes.mistakes import mistakes
from vqllm.recipes.schema import Recipe, TuningRecipe
from vqllm.recipes.shipped import QUANTIZE, TUNE, Kind, R
from vqllm.recipes.yaml_text import NOT_YAML, parse_yaml


def load(name_or_file: str | Path, changes: tuple[str, ...] = ()) -> Recipe:
    """A recipe by name (shipped) or file, with `key=value` changes applied before validation.

    Args:
        name_or_file: a name that `available` lists, or a path to a YAML file.
        changes: `dotted.key=value`, the value in YAML; list items by their index. They come after
            the recipe is merged over its base.
    """
    return _load(QUANTIZE, name_or_file, changes)


def load_tuning(name_or_file: str | Path, changes: tuple[str, ...] = ()) -> TuningRecipe:
    """The same for a recipe of `vqllm tune`."""
    return _load(TUNE, name_or_file, changes)


def from_dict(values: JSON, origin: str) -> Recipe:
    """Validate a recipe; RecipeError names each wrong key with its place.

    Args:
        values: keys of a recipe; a `base` among them is the name of a shipped one.
        origin: what messages call the recipe.
    """
    return _validated(QUANTIZE, values, origin)


def tuning_from_dict(values: JSON, origin: str) -> TuningRecipe:
    """The same for a recipe of `vqllm tune`."""
    return _validated(TUNE, values, origin)


def _load(kind: Kind[R], name_or_file: str | Path, changes: tuple[str, ...]) -> R:
    values = read(kind, name_or_file)
    for change in changes:
        _make_change(values, change)
    return _validated(kind, values, str(name_or_file))


def _validated(kind: Kind[R], values: JSON, origin: str) -> R:
    try:
        return kind.schema.model_validate(merged_over_base(kind, values, origin))
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in mistakes(error))
        raise RecipeError(f"{origin} is not a valid recipe:\n{lines}") from error


def _make_change(values: JSON, change: str) -> None:
    """Set one key of `values`, in place, to what `dotted.key=value` says."""
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {change!r}: expected key=value, for example hessian.damping=0.02")
    try:
        value = parse_yaml(text)
    except NOT_YAML as error:
        raise RecipeError(f"--set {change!r}: the value is not YAML: {error}") from error
    *parents, last = key.split(".")
    if (*parents, last)[0] == "base":
        raise RecipeError(
            f"--set {change!r}: a recipe is merged over its base before keys are set. Take the "
            "other recipe itself, or write a file with this `base`."
        )
    # Down to the mapping or list that holds the key; mappings on the way are made where none are.
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
