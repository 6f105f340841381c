"""What the compiler makes of the kernels on NVIDIA targets, without a device.

The kernels are compiled in a process of their own (see `aot`), by the installed triton and by
3.6.0, which is fetched from the package index for it. `budgets.json` has what the two made of them:
by release of triton, case and target the instructions a weight (or of a step) and the registers.
Code generation moves by 10 to 40 % between releases, so another release is held to twice the newest
figures.

    python tests/parity/test_aot.py

compiles everything and writes the file anew.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import pytest
from filelock import FileLock

TARGETS = (80, 89, 90, 100)
OLD = "3.6.0"
BUDGETS_FILE = Path(__file__).with_name("budgets.json")
BUDGETS: dict[str, dict[str, dict[str, list[float]]]] = json.loads(BUDGETS_FILE.read_text())
NEWEST = max(BUDGETS, key=lambda version: [int(part) for part in version.split(".")])
CASES = list(BUDGETS[NEWEST])
QUICK = (
    "bytes2, 2 bits, q, k, v",
    "bytes2, 2 bits, fp32",
    "3inst, 2 bits",
    "gf2, 2 bits",
    "bytes4 decode",
    "sum of the pieces, bf16",
    "e8p fp16",
    "e81b fp16, 16 tokens",
    "lut 8x1, 16 bit, fp16",
    "lut 1x8, 8 bit, decode",
    "hadamard 11008, bf16",
    "hadamard 4096 to bytes, bf16",
    "viterbi 2^12, 2.5 bits",
)
"""Every kernel, once or twice: to compile one takes seconds."""
MAY_LOAD_LESS = ("bytes2, 1.75 bits",)
"""Rows of 7 words of 32 bits: no 16 bytes."""

Figures = dict
Compile = Callable[[str, int], Figures]
"""Of a case and a target, what `aot` measured."""


def kind(case: str) -> str:
    """What sort of kernel a case is."""
    if case.startswith("hadamard"):
        return "transform"
    if case.startswith("viterbi"):
        return "search"
    if case.startswith(("activations", "sum of", "one tile")):
        return "beside the product"
    return "decode" if "decode" in case else "matmul"


def old_triton(folder: Path) -> Path | None:
    """A folder with triton 3.6.0, installed there once; None if the package index has none."""
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "triton").is_dir():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            command += ["--target", str(folder), f"triton=={OLD}"]
            if subprocess.run(command, capture_output=True, check=False, timeout=400).returncode:
                return None
    return folder


@contextmanager
def compiler(folder: Path, triton: Path | None) -> Iterator[Compile]:
    """A process that compiles cases as they are asked for, with the triton in a folder or the
    installed one; compiled code is kept in `folder`."""
    path = [str(triton)] if triton else []
    env = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_CACHE_DIR": str(folder / "compiled"),
        "PYTHONPATH": os.pathsep.join([*path, *sys.path]),
    }
    command = [sys.executable, str(Path(__file__).with_name("aot.py"))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, text=True, stdin=pipe, stdout=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        @cache
        def compiled(case: str, sm: int) -> Figures:
            process.stdin.write(f"{sm} {case}\n")
            process.stdin.flush()
            line = process.stdout.readline()
            assert line, "the process that compiles has ended; its errors are above"
            return json.loads(line)

        yield compiled
        process.stdin.close()


def installed_release() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


@pytest.fixture(scope="module")
def compilers(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory):
    """For "installed" or a version: its release, and what compiles with it."""
    triton = pytest.importorskip("triton")
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm").exists():
        pytest.skip("this triton comes without the NVIDIA tools")
    cached = getattr(pytestconfig, "cache", None)  # not there with -p no:cacheprovider
    folder = cached.mkdir("triton") if cached else tmp_path_factory.mktemp("triton")

    with ExitStack() as stack:

        @cache
        def get(version: str) -> tuple[str, Compile]:
            if version == "installed":
                return installed_release(), stack.enter_context(compiler(folder, None))
            old = old_triton(folder / version)
            if old is None:
                pytest.skip(f"triton {version} could not be installed from the package index")
            release = ".".join(version.split(".")[:2])
            return release, stack.enter_context(compiler(folder, old))

        yield get


def budget(release: str, case: str, sm: int) -> tuple[float, float]:
    """The most instructions and registers."""
    slack = 1.05 if release in BUDGETS else 2
    instructions, registers = BUDGETS.get(release, BUDGETS[NEWEST])[case][str(sm)]
    return slack * instructions, min(255, slack * registers + 8)


def builds() -> list:
    """By version of triton and target; one of them is enough for most changes."""
    return [
        pytest.param(
            version,
            sm,
            id=f"triton {version}-sm_{sm}",
            marks=() if (version, sm) == ("installed", 90) else pytest.mark.aot,
        )
        for version in ("installed", OLD)
        for sm in TARGETS
    ]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("version", "sm"), builds())
@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_what_is_made_of_a_kernel(compilers, case: str, version: str, sm: int) -> None:
    release, compiled = compilers(version)
    got, sort = compiled(case, sm), kind(case)
    most_instructions, most_registers = budget(release, case, sm)
    # Nothing is spilled.
    assert got["stack"] == 0
    assert got["registers"] <= most_registers
    assert got["shared"] <= 48 * 1024
    assert (got["per_weight"] or got["instructions"]) <= most_instructions
    if sort in ("matmul", "transform"):
        assert got["mma"] > 0, "no tensor cores"
    if sort == "matmul" and case not in MAY_LOAD_LESS:
        # Codes, and only codes, are loaded with the hint to evict them first.
        assert [load for load in got["global_loads"] if ".EF" in load] == ["LDG.E.EF.128"]
    if sort == "matmul" and "fp32" not in case:
        assert (got["shuffles"], got["shared_memory"]) == (0, 0), "operands leave the registers"
    if sort == "decode":
        wide = "STG.E.64" if case.startswith(("bytes", "3inst")) else "STG.E.128"
        assert got["global_stores"] == [wide]


def write_budgets(folder: Path) -> None:
    """Compile everything with both releases and write what came out."""
    # `aot` has the cases, and needs a process without the interpreter: this one.
    from aot import CASES as ALL

    lines = []
    for release, triton in ((installed_release(), None), ("3.6", old_triton(folder / OLD))):
        with compiler(folder, triton) as compiled:
            rows = []
            for case in ALL:
                by_target = {}
                for sm in TARGETS:
                    got = compiled(case, sm)
                    by_target[str(sm)] = [
                        got["per_weight"] or got["instructions"],
                        got["registers"],
                    ]
                rows.append(f"  {json.dumps(case)}: {json.dumps(by_target)}")
        lines.append(f" {json.dumps(release)}: {{\n" + ",\n".join(rows) + "\n }")
    BUDGETS_FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        write_budgets(Path(temporary))
