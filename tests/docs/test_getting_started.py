"""docs/getting_started.md from the first line to the last, with a tiny model called demo."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.pages import ROOT, Block, blocks, commands, text_of
from tests.support.tiny import TEXT, save_tiny
from vqllm import cli

PAGE = ROOT / "docs" / "getting_started.md"
BLOCKS = blocks(text_of(PAGE))
SMALL = ("--set", "calibration.sequences=4", "--set", "calibration.length=32")
MORE = {
    "quantize": SMALL,
    "tune": (*SMALL, "--set", "stages.0.steps=2"),
    "eval": ("--window-length", "64"),
}
"""What makes a command quick, by its name."""
INSTALL = "install"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory like a checkout: with a text, and the tiny model."""
    path = tmp_path_factory.mktemp("work")
    save_tiny(path / "tiny", num_hidden_layers=1)
    (path / "README.md").write_text(TEXT * 4)
    return path


def test_every_block_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for block in BLOCKS:
        if block.title != INSTALL:
            RUN[block.kind](block)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        *("tiny", "demo-2bit", "demo-2bit-tuned", "demo-dense")
    }
    assert "The capital of France is" in capsys.readouterr().out
    assert (folder / "demo-2bit" / "report.md").is_file()


def _shell(block: Block) -> None:
    found = commands(f"```sh\n{block.body}```\n")
    assert len(found) == len(block.body.splitlines()), "a line that is not run"
    for _, name, *arguments in found:
        given = [str(Path("tiny").resolve()) if word == "demo" else word for word in arguments]
        options = [name, *given, *MORE.get(name, ())]
        result = CliRunner().invoke(cli.app, options, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert result.stdout


def _python(block: Block) -> None:
    exec(block.body, {})


RUN: dict[str, Callable[[Block], None]] = {"sh": _shell, "python": _python}


def test_the_install_command_is_that_of_the_readme() -> None:
    (install,) = [block.body.strip() for block in BLOCKS if block.title == INSTALL]
    shells = [block.body for block in blocks(text_of(ROOT / "README.md")) if block.kind == "sh"]
    assert shells[0].startswith(f"{install} && vqllm quantize demo ")
    named = re.findall(r"-c (\S+)", "".join(shells))
    assert all(os.path.isfile(ROOT / name) for name in named)
    text = "".join(shells)
    assert "pip install -c constraints.txt -e '.[test]' && pytest\n" in text
    assert 'pytest -m ""' in text_of(ROOT / "README.md")
