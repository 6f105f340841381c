"""The two kinds of recipes, and which of each come with the package.

Shipped recipes lie in folders by what they are for: `defaults` (what presets choose, and their
family), `papers` (published methods), `codecs` (one codec each) and `tuning` (recipes of
`vqllm tune`). Their names say nothing of the folder and are unique among recipes of one kind.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from vqllm.core import resources
from vqllm.recipes.schema import Recipe, TuningRecipe

R = TypeVar("R", Recipe, TuningRecipe)


def available() -> dict[str, Path]:
    """The shipped recipes of `vqllm quantize` by name, with their files."""
    folder = resources.recipes_dir()
    return _by_name(set(folder.rglob("*.yaml")) - set(folder.glob("tuning/*.yaml")))


def available_tuning() -> dict[str, Path]:
    """The shipped recipes of `vqllm tune` by name, with their files."""
    return _by_name(resources.recipes_dir().glob("tuning/*.yaml"))


def _by_name(files: Iterable[Path]) -> dict[str, Path]:
    return {file.stem: file for file in sorted(files, key=lambda file: file.name)}


@dataclass(frozen=True)
class Kind(Generic[R]):
    """A kind of recipes."""

    schema: type[R]
    command: str
    """that takes them"""
    noun: str
    """in messages about unknown names"""
    shipped: Callable[[], dict[str, Path]]


QUANTIZE = Kind(Recipe, "vqllm quantize", "recipe", available)
TUNE = Kind(TuningRecipe, "vqllm tune", "tuning recipe", available_tuning)
