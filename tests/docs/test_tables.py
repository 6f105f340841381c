"""Tables are those of the committed results, and short enough for a page."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.pages import PAGES, ROOT, tables, text_of

RESULTS, DOCS = ROOT / "eval" / "results", ROOT / "docs"
MOST_ROWS = 12


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of eval/ can be imported; what they set in the environment is taken back."""
    monkeypatch.syspath_prepend(ROOT / "eval")
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def between(page: Path, name: str) -> str:
    _, _, rest = text_of(page).partition(f"<!-- {name}: begin -->\n")
    found, end, _ = rest.partition(f"<!-- {name}: end -->\n")
    assert end, f"{page.name} has no part {name}"
    return found


@pytest.mark.usefixtures("scripts")
def test_codecs() -> None:
    import codec_table

    rows = read("codecs.json")
    short = codec_table.best_at_two_bits(rows)
    assert len(short) == codec_table.NUM_SHORT
    assert between(DOCS / "codecs.md", "gaussian") == codec_table.table(short)
    assert between(DOCS / "appendix_codecs.md", "gaussian") == codec_table.table(rows)


@pytest.mark.usefixtures("scripts")
def test_recipes() -> None:
    import choices
    import results_table

    rows, tuned = read("demo.json"), read("tuning.json")
    shown = {name: rows[name] for name in results_table.README_ROWS}
    assert between(ROOT / "README.md", "results") == results_table.table(shown)
    chosen = {name: rows[name] for name in results_table.PAGE_ROWS}
    assert between(DOCS / "codecs.md", "results") == results_table.long_table(chosen)
    assert between(DOCS / "appendix_codecs.md", "results") == results_table.long_table(rows)
    table = choices.choices(rows, tuned)
    assert between(DOCS / "choosing.md", "results") == table
    assert table.count("\n") == 2 + len(choices.ROWS), "a row that was not measured"


@pytest.mark.usefixtures("scripts")
def test_tuning() -> None:
    import tuning_table

    assert between(DOCS / "tuning.md", "results") == tuning_table.table(read("tuning.json"))


@pytest.mark.usefixtures("scripts")
def test_rounding(tmp_path: Path) -> None:
    import proxy_report

    page, appendix = tmp_path / "rounding.md", tmp_path / "appendix_rounding.md"
    for path in (page, appendix):
        path.write_text(text_of(DOCS / path.name), encoding="utf-8")
    rows = [row for row in read("proxy.json") if row["model"] == "demo"]
    proxy_report.write_tables(page, appendix, rows)
    for path in (page, appendix):
        assert text_of(path) == text_of(DOCS / path.name)


LONG = ("log", "architecture", "appendix_codecs", "appendix_rounding")
"""Pages where long tables belong, or what was."""


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem not in LONG], ids=lambda page: page.stem
)
def test_pages_are_short_and_tell_of_today(page: Path) -> None:
    assert all(len(rows) <= MOST_ROWS for rows in tables(text_of(page)))
    if page.name != "CHANGELOG.md":
        assert "earlier state of the code" not in text_of(page)
