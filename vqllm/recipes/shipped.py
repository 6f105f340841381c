"""The recipes that come with the package."""

from pathlib import Path

from vqllm.core import resources


def available() -> dict[str, Path]:
    """The shipped recipes by name."""
    return {path.stem: path for path in sorted(resources.recipes_dir().glob("*.yaml"))}


def available_tuning() -> dict[str, Path]:
    """The shipped recipes of `vqllm tune` by name."""
    return {path.stem: path for path in sorted(resources.recipes_dir().glob("tuning/*.yaml"))}
