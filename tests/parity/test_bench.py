"""The benchmark program runs where there is no GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "kernels" / "bench" / "bench_matmul.py"


def test_dry_run_measures_every_contender() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, str(BENCH), "--dry-run", "--formats", "e8p", "--batches", "1", "16"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 2
    assert "'implementation': 'reference'" in done.stdout
