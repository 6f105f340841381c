"""Where the files that come with the package lie, in a checkout and in an installed wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def recipes_dir() -> Path:
    """The folder of the shipped recipes: `*.yaml` in folders by what they are for."""
    return _find("recipes", _PACKAGE.parent / "recipes")


def tasks_dir() -> Path:
    """The folder of the shipped lm-eval task files."""
    return _find("tasks", _PACKAGE.parent / "eval" / "tasks")


def _find(name: str, in_checkout: Path) -> Path:
    """A wheel carries the folder as package data; a checkout or an editable install has it beside
    the package."""
    in_wheel = _PACKAGE / "_data" / name
    return in_wheel if in_wheel.is_dir() else in_checkout
