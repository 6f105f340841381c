"""`vqllm codecs --bench` as a user meets it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vqllm import cli
from vqllm.errors import EvaluationError, RecipeError
from vqllm.evaluation import codec_bench


def bench(*arguments: object) -> str:
    options = ["codecs", "--bench", *map(str, arguments)]
    result = CliRunner().invoke(cli.app, options, catch_exceptions=False)
    return result.output


def test_table_json_and_plot_of_one_codec(tmp_path: Path) -> None:
    rows_file, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    printed = bench("--only", "e81b", "--json", rows_file, "--plot", plot)
    assert "e81b" in printed
    assert "dB" in printed
    (row,) = json.loads(rows_file.read_text())
    assert row["codec"] == "e81b"
    assert row["bits"] == 1
    assert row["mse"] == pytest.approx(0.318, rel=0.01)
    assert row["gap_db"] == pytest.approx(1.05, abs=0.05)
    assert row["encode_mweights_per_s"] > 0
    assert row["decode_mweights_per_s"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_an_unknown_codec_is_named() -> None:
    with pytest.raises(RecipeError, match=r"unknown codec 'e8q'\. Did you mean '(e81b|e8p)'"):
        bench("--only", "e8q")


def test_a_file_that_cannot_be_written_is_named_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec_bench, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(EvaluationError, match="cannot be written"):
        bench("--json", tmp_path / "missing" / "rows.json")


@pytest.mark.parametrize("option", ["--json", "--plot", "--only"])
def test_options_of_the_bench_need_it(option: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["codecs", option, str(tmp_path / "x")])
    assert result.exit_code != 0
    assert "add --bench" in result.output
