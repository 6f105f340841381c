"""What a killed command leaves is removed by the next one, and two commands do not mix."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from tests.support.fake_checkpoint import FORMATS, fake_checkpoint
from vqllm.checkpoint.dequantize import dequantize_checkpoint
from vqllm.errors import CheckpointError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_checkpoint(tmp_path_factory.mktemp("fake"), "llama", FORMATS["e8p"]).folder


def test_what_a_killed_dequantize_left_is_removed(checkpoint: Path, tmp_path: Path) -> None:
    left = tmp_path / ".dense.partial" / "folder"
    left.mkdir(parents=True)
    (left / "model-00001-of-00001.safetensors").write_bytes(bytes(1000))
    (left.parent / "lock").touch()
    dequantize_checkpoint(checkpoint, tmp_path / "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    assert {path.name for path in (tmp_path / "dense").iterdir()} >= {"config.json"}


def test_only_one_writes_a_folder(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / ".dense.partial").mkdir()
    with (
        FileLock(tmp_path / ".dense.partial" / "lock"),
        pytest.raises(CheckpointError, match="another process is writing"),
    ):
        dequantize_checkpoint(checkpoint, tmp_path / "dense")
    dequantize_checkpoint(checkpoint, tmp_path / "dense")
    with pytest.raises(CheckpointError, match="not empty"):
        dequantize_checkpoint(checkpoint, tmp_path / "dense")


DEFAULT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""
IGNORED = DEFAULT.replace("default_int_handler", "SIG_IGN")
SLOW = """
import sys, time
from vqllm import cli
from vqllm.checkpoint import dequantize
dequantize._write = lambda *_: (print("begun", flush=True), time.sleep(600))
sys.argv = ["vqllm", "dequantize", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.parametrize(
    ("kill", "background"),
    [
        (signal.SIGTERM, True),
        pytest.param(signal.SIGHUP, False, marks=pytest.mark.slow),
        (signal.SIGKILL, False),
    ],
    ids=["SIGTERM in the background", "SIGHUP", "SIGKILL"],
)
def test_a_killed_dequantize(
    kill: signal.Signals, background: bool, checkpoint: Path, tmp_path: Path
) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    # A shell's job in the background ignores Ctrl-C from its start on.
    slow = f"{IGNORED if background else DEFAULT}{SLOW}"
    command = [sys.executable, "-c", slow, str(checkpoint), "--output", str(tmp_path / "dense")]
    running = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "begun\n"
    time.sleep(0.2)
    running.send_signal(kill)
    running.wait()
    running.stdout.close()
    if kill is not signal.SIGKILL:  # it could clean up
        assert running.returncode == 128 + kill
        assert list(tmp_path.iterdir()) == []
    dequantize_checkpoint(checkpoint, tmp_path / "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
