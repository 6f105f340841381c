"""Several processes quantize one model, and write the bytes of one."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.architectures import save_tiny as save_architecture
from tests.support.params import slow
from tests.support.tiny import TEXT, save_tiny
from vqllm import cli

ROOT = Path(cli.__file__).parents[1]
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
"""Enough rows for several processes to share those of one linear."""
CALIBRATION = ("--set", "calibration.sequences=96", "--set", "calibration.length=64")
"""Three units of 32 sequences: `vqllm.calibration.shares`."""
TIMES = ("README.md", "report.md")
"""Pages that tell times."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "text.txt").write_text(TEXT * 200)
    save_tiny(folder / "dense", "qwen2", **SHAPE)
    return folder


def environment(**others: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    fixed = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **fixed, **others}


def arguments(root: Path, model: str, output: str, options: Sequence[str]) -> list[str]:
    text = root / "text.txt"
    given = ["quantize", root / model, "--output", root / output, "--calibration", text]
    return [*map(str, given), "--device", "cpu", "--no-eval", *CALIBRATION, *options]


def start(num: int, programs: Sequence[Sequence[str]]) -> list[subprocess.Popen[str]]:
    """Processes as a launcher starts them, without one that ends all when one ends."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, *programs[rank % len(programs)]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(num),
                LOCAL_WORLD_SIZE=str(num),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
        )
        for rank in range(num)
    ]


def run(num: int, given: Sequence[str]) -> list[tuple[int, str, str]]:
    """Exit code, output and messages of each process."""
    processes = start(num, [["-m", "vqllm", *given]])
    found = [process.communicate(timeout=500) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, found)]


def alone(given: Sequence[str]) -> None:
    command = [sys.executable, "-m", "vqllm", *given]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    assert not (folder / ".vqllm").exists()
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in TIMES}


FAST = ("--recipe", "trellis-2bit-fast")


def test_two_processes_write_the_bytes_of_one(root: Path) -> None:
    given = arguments(root, "dense", "one", FAST)
    alone(given)
    first, second = run(2, arguments(root, "dense", "two", FAST))
    assert first[0] == 0, first[2]
    assert second == (0, "", "")  # it says nothing
    assert contents(root / "two") == contents(root / "one")


CASES = {
    "gradients": (2, "dense", ("--recipe", "spread-2bit", "--set", "allocation.bits=2.8")),
    "embeddings": (3, "dense", ("--recipe", "spread-small", "--set", "allocation.bits=5")),
    "layers are trained": (
        2,
        "dense",
        ("--recipe", "e8p-2bit", "--set", "layer={steps: 2, batch: 2}"),
    ),
    "the original beside": (3, "dense", ("--recipe", "e8p-2bit", "--set", "target.of=residual")),
    "all groups at once": (2, "dense", ("--recipe", "gptq-4bit", "--set", "hessian.refresh=layer")),
    "more processes than units": (4, "dense", ("--recipe", "rtn-4bit")),
    "experts": (2, "mixture", ("--recipe", "e8p-2bit")),
    "experts, gradients": (3, "mixture", ("--recipe", "spread-3bit", "--set", "allocation.bits=6")),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_so_do_others(root: Path, case: str) -> None:
    num, model, options = CASES[case]
    if model == "mixture" and not (root / model).is_dir():
        save_architecture("qwen3_moe", root / model)
    alone(arguments(root, model, f"{case} 1", options))
    for code, _, told in run(num, arguments(root, model, f"{case} {num}", options)):
        assert code == 0, told
    assert contents(root / f"{case} {num}") == contents(root / f"{case} 1")


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_launchers_start_them(root: Path, launcher: tuple[str, ...]) -> None:
    options = ("--recipe", "rtn-4bit")
    alone(arguments(root, "dense", f"{launcher[0]} 1", options))
    given = arguments(root, "dense", f"{launcher[0]} 2", options)
    command = [sys.executable, "-m", *launcher, "2", "-m", "vqllm", *given]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("from_pretrained(") == 1  # only one of them talks
    assert contents(root / f"{launcher[0]} 2") == contents(root / f"{launcher[0]} 1")


KILLED = """
import os, signal, sys
from vqllm import cli
from vqllm.checkpoint.resume.shared_run import SharedRun

write, (which, when) = SharedRun.write_layer, map(int, sys.argv[1:3])

def killed(self, index, *others):
    if index == when and int(os.environ["RANK"]) == which:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, index, *others)

SharedRun.write_layer = killed
sys.argv[1:] = sys.argv[3:]
cli.main()
"""


@pytest.mark.parametrize("which", [slow(0), slow(1), slow(2)])
def test_killed_in_any_process_it_goes_on_in_another_number(root: Path, which: int) -> None:
    name = f"killed {which}"
    (root / "killed.py").write_text(KILLED)
    given = arguments(root, "dense", name, FAST)
    if not (root / "one").exists():
        alone(arguments(root, "dense", "one", FAST))
    processes = start(3, [[str(root / "killed.py"), str(which), "1", *given]])
    processes[which].wait(400)
    begin = time.monotonic()
    told = {rank: own.communicate(timeout=90)[1] for rank, own in enumerate(processes)}
    assert time.monotonic() - begin < 60
    assert processes[which].returncode == -signal.SIGKILL
    for rank, own in enumerate(processes):
        if rank != which:
            assert own.returncode != 0
            assert f"process {which} (host {socket.gethostname()}" in told[rank]
            assert "the same command goes on" in told[rank]
    (first, *others) = run(2, given)
    assert first[0] == 0, first[2]
    assert [own[0] for own in others] == [0]
    assert contents(root / name) == contents(root / "one")


@pytest.mark.slow
def test_an_error_of_one_process_is_told_by_all(root: Path) -> None:
    (root / "fails.py").write_text(
        KILLED.replace(
            "os.kill(os.getpid(), signal.SIGKILL)", 'raise SystemError("its memory is bad")'
        )
    )
    given = arguments(root, "dense", "fails", FAST)
    processes = start(2, [[str(root / "fails.py"), "1", "0", *given]])
    found = [own.communicate(timeout=400)[1] for own in processes]
    assert all(own.returncode != 0 for own in processes)
    assert "process 1 (host" in found[0]
    assert "its memory is bad" in found[0]
    assert "Traceback" not in found[0]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "recipe", "text"])
def test_processes_for_different_work_say_so(root: Path, what: str) -> None:
    own, other = root / f"{what} here", root / f"{what} there"
    for folder in (own, other):
        folder.mkdir()
        shutil.copytree(root / "dense", folder / "dense")
        (folder / "text.txt").write_text(TEXT * 200)
    programs = []
    for folder in (own, other):
        recipe = "rtn-4bit"
        if folder == other and what == "model":
            shutil.rmtree(folder / "dense")
            save_tiny(folder / "dense", "qwen2", **{**SHAPE, "num_hidden_layers": 1})
        if folder == other and what == "recipe":
            recipe = "gptq-4bit"
        given = arguments(folder, "dense", "out", ("--recipe", recipe))
        given[given.index("--calibration") + 1] = "text.txt"
        change = f"import os; os.chdir({str(folder)!r}); from vqllm.cli import main; main()"
        programs.append(["-c", change, *given])
    if what == "text":
        (other / "text.txt").write_text(TEXT * 100)
    processes = start(2, programs)
    found = [own.communicate(timeout=400)[1] for own in processes]
    assert all(own.returncode == 2 for own in processes)
    for told in found:
        assert "started for different work (process 0 → process 1)" in told
        assert {"model": "source.", "recipe": "recipe.", "text": "text text.txt"}[what] in told
    assert not (own / "out").exists()
