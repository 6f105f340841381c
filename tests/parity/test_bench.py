"""The benchmark programs run where there is no GPU.

They run in this process, and with the formats of other tests, whose kernels are compiled already.
"""

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
import torch

from vqllm_kernels.cpu import instructions

PACKED = instructions.instructions() != "portable"
FOLDER = Path(__file__).parents[2] / "kernels" / "bench"


class Run(Protocol):
    def __call__(self, program: str, *arguments: str | Path) -> None: ...


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs a program of the folder with arguments, as a shell would."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(FOLDER)

    def call(program: str, *arguments: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", [program, "--dry-run", *map(str, arguments)])
        runpy.run_path(str(FOLDER / program), run_name="__main__")

    yield call
    torch.set_num_threads(threads)
    for path in FOLDER.glob("*.py"):  # programs import each other
        sys.modules.pop(path.stem, None)


def test_dry_run_measures_every_contender(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    formats = ["e8p", "trellis bytes2, 2 bits"]
    run("bench_matmul.py", "--formats", *formats, "--batches", "1", "20")
    lines = capsys.readouterr().out.splitlines()
    # Two formats, a linear and three of one input, two batches.
    assert len(lines) == 8
    assert any("'rows': '48+16+16'" in line for line in lines)
    implementation = "packed" if PACKED else "reference"
    assert any(f"'implementation': '{implementation}'" in line for line in lines)


def test_dry_run_of_a_whole_model(run: Run, tmp_path: Path) -> None:
    run("bench_model.py", "--output", tmp_path, "--formats", "trellis 2 bits")
    (row,) = json.loads((tmp_path / "model-cpu.json").read_text())
    assert row["speedup"] > 0
    assert row["kernels"] == (["packed"] if PACKED else ["dense weights, kept"])


def test_dry_run_of_the_look_ups(run: Run, tmp_path: Path) -> None:
    run("bench_cpu.py", "--output", tmp_path / "cpu.csv")
    assert len((tmp_path / "cpu.csv").read_text().splitlines()) == 6


def test_dry_run_of_packed_linears(run: Run, tmp_path: Path) -> None:
    file, chosen = tmp_path / "packed.csv", ["bytes2, 2 bits", "e8p, 2 bits"]
    run("bench_packed.py", "--output", file, "--rows", "1", "20", "--only", *chosen)
    assert len(file.read_text().splitlines()) == 5
