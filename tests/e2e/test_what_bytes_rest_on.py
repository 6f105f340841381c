"""The same text, recipe and seed give the same folder, whatever a run's surroundings are.

Each run is a process of its own, because threads and locale are settled when one starts.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.params import slow_but
from tests.support.tiny import TEXT, save_tiny

ROOT = Path(__file__).parents[2]
CHANGES = ("calibration.sequences=4", "calibration.length=32")
RECIPES = {
    "rtn-4bit": (),
    "e8p-2bit": (),
    "spread-2bit": ("allocation.bits=2.9",),  # gradients, and bits that they allocate
    "kmeans-2bit": (),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text with more than ASCII in it, and the same text elsewhere."""
    work = tmp_path_factory.mktemp("work")
    save_tiny(work / "tiny", "qwen2")
    (work / "cal.txt").write_text((TEXT + " Größe, 大きさ\n") * 40, encoding="utf-8")
    (work / "elsewhere").mkdir()
    shutil.copy(work / "cal.txt", work / "elsewhere" / "cal.txt")
    shutil.copy(work / "cal.txt", work / "elsewhere" / "copy.txt")
    return work


def quantize(
    work: Path,
    recipe: str,
    text: str | Path = "cal.txt",
    model: str | Path = "tiny",
    inside: str = ".",
    output: str | Path = "out",
    **environment: str,
) -> dict[str, bytes]:
    """The files of a quantized folder, by name."""
    words = ["quantize", model, "--recipe", recipe, "--output", output, "--calibration", text]
    for change in (*CHANGES, *RECIPES[recipe]):
        words += ["--set", change]
    folder = work / inside
    shutil.rmtree(folder / output, ignore_errors=True)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    settings = {"OMP_NUM_THREADS": "1", "VQLLM_CACHE": str(work / "cache"), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-m", "vqllm", *map(str, words)],
        cwd=folder,
        env={**os.environ, **settings, **environment},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return {file.name: file.read_bytes() for file in (folder / output).iterdir()}


@pytest.fixture(scope="module")
def first(work: Path) -> Callable[[str], dict[str, bytes]]:
    """The files of a recipe's plain run."""
    found: dict[str, dict[str, bytes]] = {}

    def files(recipe: str) -> dict[str, bytes]:
        if recipe not in found:
            found[recipe] = quantize(work, recipe)
        return found[recipe]

    return files


def check_same(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert "model-00003-of-00003.safetensors" in expected


@pytest.mark.parametrize(
    "text",
    slow_but(
        ["WORK/cal.txt"], ["./cal.txt", "WORK/cal.txt", "elsewhere/cal.txt", "elsewhere/../cal.txt"]
    ),
)
def test_spelling_and_place_of_the_text(
    text: str, work: Path, first: Callable[[str], dict[str, bytes]]
) -> None:
    found = quantize(work, "rtn-4bit", text.replace("WORK", str(work)))
    check_same(found, first("rtn-4bit"))


def test_another_name_of_the_text(work: Path, first: Callable[[str], dict[str, bytes]]) -> None:
    expected = first("rtn-4bit")
    # Under another name the pages name another file; the weights are the same.
    found = quantize(work, "rtn-4bit", "elsewhere/copy.txt")
    shards = [name for name in expected if name.endswith(("safetensors", "index.json"))]
    assert [name for name in shards if found[name] != expected[name]] == []


def test_working_directory(work: Path, first: Callable[[str], dict[str, bytes]]) -> None:
    found = quantize(work, "rtn-4bit", "cal.txt", work / "tiny", "elsewhere", "../deeper/out")
    check_same(found, first("rtn-4bit"))


@pytest.mark.parametrize("recipe", slow_but(["e8p-2bit"], [*RECIPES]))
def test_number_of_threads(
    work: Path, first: Callable[[str], dict[str, bytes]], recipe: str
) -> None:
    check_same(quantize(work, recipe, OMP_NUM_THREADS="2"), first(recipe))


def test_locale(work: Path, first: Callable[[str], dict[str, bytes]]) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    check_same(quantize(work, "rtn-4bit", **plain), first("rtn-4bit"))
