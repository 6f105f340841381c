"""Every file and every module that the pages name exists."""

import importlib
import re
from pathlib import Path

import pytest

from tests.support.pages import PAGES, ROOT, text_of

PATH = re.compile(r"(?<![\w./-])(?:vqllm|kernels|tests|eval|recipes|docs)/[\w./-]*\w")
MODULE = re.compile(r"(?<![\w./-])vqllm(?:\.\w+)+")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#([^)]*))?\)")
MADE_UP = ("hexagonal", "mycodec")
"""In names of what a tutorial adds."""
GROUPS = {"vqllm.roundings", "vqllm.formats", "vqllm.transform_kinds"}
"""Of entry points, which are no modules."""
PLACEHOLDERS = "<*{"
"""Characters after which the rest of a path stands for any."""


def names(pattern: re.Pattern[str], page: Path) -> set[str]:
    """What matches, but for made up names."""
    text = text_of(page)
    found = [match for match in pattern.finditer(text) if text[match.end() :][:2] != "/<"]
    whole = {match[0] for match in found if text[match.end() :][:1] not in PLACEHOLDERS}
    return {name for name in whole if not any(word in name for word in MADE_UP)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_paths(page: Path) -> None:
    """From the root, or from the package."""
    roots = (ROOT, ROOT / "vqllm")
    assert not {n for n in names(PATH, page) if not any((root / n).exists() for root in roots)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_modules(page: Path) -> None:
    for name in names(MODULE, page) - GROUPS:
        _resolve(name)


def _resolve(dotted: str) -> object:
    """The module, or an attribute of the longest part of the name that is one."""
    parts = dotted.split(".")
    found: object = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            found = getattr(found, part)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links(page: Path) -> None:
    """Files and the headings in them."""
    for path, heading in LINK.findall(text_of(page)):
        target = (page.parent / path).resolve()
        assert target.exists(), path
        if heading:
            titles = re.findall(r"^#+ (.*)$", text_of(target), re.MULTILINE)
            assert heading in map(_anchor, titles), f"{path}#{heading}"


def _anchor(title: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
