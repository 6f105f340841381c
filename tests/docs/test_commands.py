"""Every command of the pages is one that the command line takes, with recipes that exist."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.support.pages import PAGES, ROOT, commands, inline_commands, text_of
from vqllm import cli, recipes
from vqllm.runs.compare.grid import expand, parse_grid

GROUP: Any = typer.main.get_command(cli.app)
MADE_UP = ("hexagonal", "mycodec", "mine", "FILE", "NAME")
"""In names of codecs and recipes that a page adds, or that stand for any."""


def cases(find: Any, pages: list[Path]) -> list[Any]:
    return [
        pytest.param(words, id=f"{page.stem}-{i}-{words[1]}")
        for page in pages
        for i, words in enumerate(find(text_of(page)))
    ]


WHOLE = cases(commands, PAGES) + cases(inline_commands, [ROOT / "docs" / "choosing.md"])


@pytest.mark.parametrize("words", WHOLE)
def test_a_command_is_taken(words: list[str]) -> None:
    """Its arguments, its options, and the recipe that they make."""
    name, *arguments = words[1:]
    if {"...", "NAME"} & set(arguments):
        pytest.skip("a part of a command")
    context = GROUP.commands[name].make_context(name, list(arguments))
    given = context.params
    if name == "quantize" and not _made_up(arguments):
        bits, preset = given["bits"], given["preset"]
        recipe = given["recipe"] or recipes.best(bits or 2.0, preset or "balanced")
        recipes.load(recipe, tuple(given["changes"] or ()))
    if name == "tune" and not _made_up(arguments):
        recipes.load_tuning(given["recipe"], tuple(given["changes"] or ()))
    if name == "compare" and not _made_up(given["grid"] or ()):
        listed = [part for item in given["recipe"] for part in item.split(",")]
        known = [part for part in listed if not _made_up([part])]
        expand(known, parse_grid(given["grid"] or ()), (), recipes.load)


def _made_up(arguments: Iterable[str]) -> bool:
    return any(name in word for word in arguments for name in MADE_UP)


@pytest.mark.parametrize("words", cases(inline_commands, PAGES))
def test_a_named_command_has_these_options(words: list[str]) -> None:
    command = GROUP.commands[words[1]]
    options = {option for parameter in command.params for option in parameter.opts}
    options |= {option for parameter in command.params for option in parameter.secondary_opts}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options


def test_recipes_named_with_a_rate_exist() -> None:
    """Names such as trellis-2bit-fast between backticks or in a table."""
    known = {*recipes.available(), *recipes.available_tuning()}
    pattern = r"(?<![\w/-])[a-z0-9]+(?:-[a-z0-9]+)*-[1-4](?:\.5)?bit(?:-[a-z]+)?(?![\w.*?-])"
    for page in PAGES:
        if page.name in ("log.md", "CHANGELOG.md"):
            continue  # recipes that were
        for name in re.findall(pattern, text_of(page)):
            if not any(part in name for part in (*MADE_UP, "demo")):
                assert name in known, f"{page.name}: {name}"
