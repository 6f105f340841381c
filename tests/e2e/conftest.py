"""A tiny model and a text to calibrate it on, in a folder for each file of tests."""

from pathlib import Path

import pytest

from tests.support.tiny import TEXT, save_tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def source(root: Path) -> Path:
    return save_tiny(root / "source", "qwen2")


@pytest.fixture(scope="module")
def text(root: Path) -> Path:
    (root / "text.txt").write_text(TEXT * 60)
    return root / "text.txt"
