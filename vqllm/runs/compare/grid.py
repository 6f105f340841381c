"""The members of a comparison: every named recipe, crossed with every value of a grid."""

import fnmatch
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vqllm import recipes
from vqllm.core.protocols import JSON
from vqllm.errors import RecipeError
from vqllm.recipes import Recipe

Origin = str | Path | Recipe
"""A shipped recipe's name, a YAML file, or the object itself."""

WILD = re.compile(r"[*?[]")
PLAIN = re.compile(r"[a-z0-9.-]*[a-z0-9]")
"""Texts that stand in a folder's name as they are, on systems that ignore case too."""
LONGEST_TEXT = 40
"""Characters of a recipe's name or a value in the name of a member."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One recipe of a comparison."""

    name: str
    """of its folder and in tables; the same whenever the same command is given"""
    recipe: Recipe
    origin: Origin
    changes: tuple[str, ...]
    """`dotted.key=value`, of the whole comparison and of this member"""


def expand(
    named: Iterable[Origin],
    grid: Mapping[str, Sequence[Any]],
    changes: Sequence[str],
    build: Callable[[Origin, tuple[str, ...]], Recipe],
) -> tuple[list[Member], dict[str, str]]:
    """The members in the order they are run, and the ones left out as a repetition of another.

    Args:
        named: recipes; texts may be comma-separated lists and patterns over the shipped names.
        grid: values by dotted key of the recipe. Every recipe is taken with every combination.
        changes: of every member.
        build: reads a recipe with changes.

    Raises:
        RecipeError: nothing is named, a pattern without a match, a combination that is no recipe
            (all of them are listed), or two members of one name.
    """
    origins = _origins(named)
    if not origins:
        raise RecipeError("there is nothing to compare: name recipes with --recipe.")
    _check_values(grid)
    # All refusals are collected, so that one message names them all.
    members: list[Member] = []
    refused: list[str] = []
    for origin, values in itertools.product(origins, itertools.product(*grid.values())):
        point = dict(zip(grid, values))
        name = _name(origin, point)
        own = tuple(f"{key}={_flow(value)}" for key, value in point.items())
        try:
            recipe = build(origin, (*changes, *own))
        except RecipeError as error:
            refused.append(f"{name}: {error}")
            continue
        members.append(Member(name=name, recipe=recipe, origin=origin, changes=(*changes, *own)))
    if refused:
        num = len(origins) * len(list(itertools.product(*grid.values())))
        raise RecipeError(
            f"{len(refused)} of {num} members cannot be run:\n" + "\n".join(refused) + "\nLeave "
            "them out of --recipe and --grid, or compare them in a folder of their own."
        )
    return _unique(members)


def parse_grid(axes: Iterable[str]) -> dict[str, list[Any]]:
    """The grid that the command line means.

    Args:
        axes: `dotted.key=values`, the values as they stand between the brackets of a YAML list:
            `codec.bits=2,3`, `skip=[],[lm_head]`, `rounding={type: ldlq},{type: nearest}`.

    Raises:
        RecipeError: not of that form, or a key that comes twice.
    """
    grid: dict[str, list[Any]] = {}
    for axis in axes:
        key, equals, text = axis.partition("=")
        if not equals or not key:
            raise RecipeError(
                f"--grid {axis!r}: expected key=value,value, for example codec.bits=2,3"
            )
        if key in grid:
            raise RecipeError(f"--grid has {key} twice: give all of its values at once.")
        try:
            values = recipes.parse_yaml(f"[{text}]")
        except recipes.NOT_YAML as error:
            raise RecipeError(
                f"--grid {axis!r}: the values are no inside of a YAML list: {error}"
            ) from error
        grid[key] = values
    return grid


def settings_of(recipe: JSON) -> JSON:
    """All of a recipe but its words: equal ones make equal weights."""
    return {key: value for key, value in recipe.items() if key not in ("name", "description")}


def _origins(named: Iterable[Origin]) -> list[Origin]:
    """Every recipe once, in the order in which they are named."""
    shipped = recipes.available()
    found: dict[Any, Origin] = {}
    for item in named:
        if isinstance(item, Recipe):
            found[json.dumps(item.to_dict())] = item
            continue
        whole = os.path.isfile(item)
        for text in [str(item)] if whole else map(str.strip, str(item).split(",")):
            if os.path.isfile(text) or not WILD.search(text):
                found[text] = text
                continue
            matches = fnmatch.filter(shipped, text)
            if not matches:
                raise RecipeError(
                    f"no shipped recipe matches {text!r}. There are: {', '.join(shipped)}."
                )
            found |= {name: name for name in matches}
    return list(found.values())


def _check_values(grid: Mapping[str, Sequence[Any]]) -> None:
    for key, values in grid.items():
        if isinstance(values, str) or not values:
            raise RecipeError(f"the grid has {values!r} for {key}: give a list of values.")
        for value in values:
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise RecipeError(
                    f"the grid has {value!r} for {key}, which no recipe can hold: {error}."
                ) from error


def _name(origin: Origin, point: Mapping[str, Any]) -> str:
    if isinstance(origin, Recipe):
        own = origin.name
    else:
        own = Path(origin).stem if os.path.isfile(origin) else str(origin)
    lasts = [key.rpartition(".")[2] for key in point]
    parts = [_safe(own)]
    for key, value in point.items():
        last = key.rpartition(".")[2]
        shown = last if lasts.count(last) == 1 else key
        kind = value.get("type") if isinstance(value, dict) else None
        text = _safe(_flow(value), str(kind) if kind else None)
        parts.append(f"{re.sub(r'[^A-Za-z0-9._-]', '-', shown)}-{text}")
    return "_".join(parts)


def _safe(text: str, shown: str | None = None) -> str:
    """A text as a part of a folder's name; where it had to change, with a digest of what it was."""
    if len(text) <= LONGEST_TEXT and PLAIN.fullmatch(text) and not text.startswith("."):
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    shown = text if shown is None else shown
    readable = re.sub(r"[^a-z0-9]+", "-", shown.lower())[: LONGEST_TEXT - 9].strip("-")
    return f"{readable}-{digest}" if readable else digest


def _flow(value: object) -> str:
    """A value in YAML, in one line."""
    options: Any = {"default_flow_style": True, "width": float("inf"), "allow_unicode": True}
    return yaml.safe_dump([value], **options).strip()[1:-1]


def _unique(members: list[Member]) -> tuple[list[Member], dict[str, str]]:
    """Members of different settings, and the others by name with the member that they repeat."""
    distinct: dict[str, Member] = {}
    repeated: dict[str, str] = {}
    folders: dict[str, str] = {}
    for member in members:
        settings = json.dumps(settings_of(member.recipe.to_dict()), sort_keys=True)
        if settings in distinct:
            if member.name != distinct[settings].name:
                repeated[member.name] = distinct[settings].name
            continue
        other = folders.setdefault(member.name.casefold(), settings)
        if other != settings:
            raise RecipeError(
                f"two recipes would be called {member.name}: rename one of the files, or its "
                "`name`."
            )
        distinct[settings] = member
    return list(distinct.values()), repeated
