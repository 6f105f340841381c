"""What the pages of the documentation show: blocks of code, commands, tables."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "eval" / "README.md",
        ROOT / "kernels" / "bench" / "README.md",
    ]
)
"""Every page."""


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    kind: str
    title: str
    body: str


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    """All fenced blocks, in order; the title of ```` ```sh title="install" ```` is "install"."""
    found = re.findall(r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)
    return [Block(*groups) for groups in found]


def commands(text: str) -> list[list[str]]:
    """The words of every line that calls vqllm, of a block for a shell or an indented one."""
    shells = [block.body for block in blocks(text) if block.kind == "sh"]
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    shells.append("\n".join(re.findall(r"^    (\S.*)$", outside, re.MULTILINE)))
    lines = "\n".join(shells).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split(" && ")]
    return [shlex.split(part, comments=True) for part in parts if part.startswith("vqllm ")]


def inline_commands(text: str) -> list[list[str]]:
    """The words of every command between backticks, which may be a part of one only."""
    spans = re.findall(r"`(vqllm [a-z][^`]*)`", text.replace("\n", " "))
    return [shlex.split(span) for span in spans]


def tables(text: str) -> list[list[str]]:
    """The lines of every table, without its head."""
    found = re.findall(r"^\|[^\n]*\n\|[ :|-]+\n((?:\|[^\n]*\n)*)", text, re.MULTILINE)
    return [body.splitlines() for body in found]
