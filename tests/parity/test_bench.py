"""The benchmark program runs where there is no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vqllm_kernels.cpu import instructions

PACKED = instructions.instructions() != "portable"
FOLDER = Path(__file__).parents[2] / "kernels" / "bench"


def test_dry_run_measures_every_contender() -> None:
    pytest.importorskip("triton")
    formats = ["e8p", "trellis bytes2, 2 bits"]
    command = [sys.executable, str(FOLDER / "bench_matmul.py"), "--dry-run"]
    command += ["--formats", *formats, "--batches", "1", "16"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # Two formats, a linear and three of one input, two batches.
    assert len(done.stdout.splitlines()) == 8
    assert "'rows': '48+16+16'" in done.stdout
    implementation = "packed" if PACKED else "reference"
    assert f"'implementation': '{implementation}'" in done.stdout


def test_dry_run_of_a_whole_model(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "bench_model.py"), "--dry-run", "--output", tmp_path]
    subprocess.run([*command, "--formats", "trellis 2 bits"], capture_output=True, check=True)
    (row,) = json.loads((tmp_path / "model-cpu.json").read_text())
    assert row["speedup"] > 0
    assert row["kernels"] == (["packed"] if PACKED else ["dense weights, kept"])


def test_dry_run_of_the_look_ups(tmp_path: Path) -> None:
    file = tmp_path / "cpu.csv"
    command = [sys.executable, str(FOLDER / "bench_cpu.py"), "--dry-run", "--output", str(file)]
    subprocess.run(command, capture_output=True, check=True)
    assert len(file.read_text().splitlines()) == 6


def test_dry_run_of_packed_linears(tmp_path: Path) -> None:
    file = tmp_path / "packed.csv"
    command = [sys.executable, str(FOLDER / "bench_packed.py"), "--dry-run", "--output", str(file)]
    chosen = ["--only", "bytes2, 2 bits", "e8p, 2 bits", "--rows", "1", "20"]
    subprocess.run([*command, *chosen], capture_output=True, check=True)
    assert len(file.read_text().splitlines()) == 5
