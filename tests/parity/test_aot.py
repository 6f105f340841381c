"""What the compiler makes of the kernels on NVIDIA targets, without a device.

The kernels are compiled in processes of their own (see `aot`), by the installed triton and by
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TARGETS = (80, 89, 90, 100)
OLD = "3.6.0"
BUDGETS_FILE = Path(__file__).with_name("budgets.json")
BUDGETS: dict[str, dict[str, dict[str, list[float]]]] = json.loads(BUDGETS_FILE.read_text())
NEWEST = max(BUDGETS, key=lambda version: [int(part) for part in version.split(".")])
CASES = list(BUDGETS[NEWEST])
MAY_LOAD_LESS = ("bytes2, 1.75 bits",)
"""Rows of 7 words of 32 bits: no 16 bytes."""


def kind(case: str) -> str:
    """What sort of kernel a case is."""
    if case.startswith("hadamard"):
        return "transform"
    if case.startswith("viterbi"):
        return "search"
    if case.startswith(("activations", "sum of", "one tile")):
        return "beside the product"
    return "decode" if "decode" in case else "matmul"


MATMULS = [case for case in CASES if kind(case) == "matmul"]
DECODES = [case for case in CASES if kind(case) == "decode"]
TRANSFORMS = [case for case in CASES if kind(case) == "transform"]


def old_triton(folder: Path) -> Path | None:
    """A folder with triton 3.6.0, installed there once; None if the package index has none."""
    if not (folder / "triton").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--target", str(folder), f"triton=={OLD}"]
        if subprocess.run(command, capture_output=True, check=False, timeout=400).returncode:
            return None
    return folder


def compiled(targets: tuple[int, ...], cache: Path, triton: Path | None) -> dict:
    """ "case, sm_target" -> what `aot` measured, with the triton in a folder or the installed."""
    path = [str(triton)] if triton else []
    env = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join([*path, *sys.path]),
    }
    script = Path(__file__).with_name("aot.py")

    def run(target: int) -> dict:
        command = [sys.executable, str(script), str(target)]
        done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, targets))
    return {key: figures for result in results for key, figures in result.items()}


def installed_release() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


@pytest.fixture(scope="session", params=["installed", OLD])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(release of triton, "case, sm_target" -> what `aot` measured)."""
    triton = pytest.importorskip("triton")
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm").exists():
        pytest.skip("this triton comes without the NVIDIA tools")
    cache = request.config.cache
    folder = cache.mkdir("triton") if cache else tmp_path_factory.mktemp("triton")
    if request.param == "installed":
        return installed_release(), compiled(TARGETS, folder / "compiled", None)
    if triton.__version__ == OLD:
        pytest.skip("it is the installed one")
    old = old_triton(folder / OLD)
    if old is None:
        pytest.skip(f"triton {OLD} could not be installed from the package index")
    return "3.6", compiled(TARGETS, folder / "compiled", old)


@pytest.fixture(params=TARGETS, ids=lambda sm: f"sm_{sm}")
def sm(request: pytest.FixtureRequest) -> int:
    return request.param


def budget(release: str, case: str, sm: int) -> tuple[float, float]:
    """The most instructions and registers."""
    slack = 1.05 if release in BUDGETS else 2
    instructions, registers = BUDGETS.get(release, BUDGETS[NEWEST])[case][str(sm)]
    return slack * instructions, min(255, slack * registers + 8)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_spilled(built, case, sm):
    release, figures = built
    got = figures[f"{case}, sm_{sm}"]
    assert got["stack"] == 0
    assert got["registers"] <= budget(release, case, sm)[1]
    assert got["shared"] <= 48 * 1024


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES)
def test_instructions_stay_in_budget(built, case, sm):
    release, figures = built
    got = figures[f"{case}, sm_{sm}"]
    assert (got["per_weight"] or got["instructions"]) <= budget(release, case, sm)[0]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", [case for case in MATMULS if case not in MAY_LOAD_LESS])
def test_codes_are_loaded_16_bytes_at_a_time(built, case, sm):
    loads = built[1][f"{case}, sm_{sm}"]["global_loads"]
    # Codes, and only codes, are loaded with the hint to evict them first.
    assert [width for width in loads if ".EF" in width] == ["LDG.E.EF.128"]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", [*MATMULS, *TRANSFORMS])
def test_tensor_cores_are_used(built, case, sm):
    assert built[1][f"{case}, sm_{sm}"]["mma"] > 0


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", [case for case in MATMULS if "fp32" not in case])
def test_operands_stay_in_registers(built, case, sm):
    got = built[1][f"{case}, sm_{sm}"]
    assert got["shuffles"] == 0
    assert got["shared_memory"] == 0


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", DECODES)
def test_weights_are_stored_8_or_16_bytes_at_a_time(built, case, sm):
    wide = "STG.E.64" if case.startswith(("bytes", "3inst")) else "STG.E.128"
    assert built[1][f"{case}, sm_{sm}"]["global_stores"] == [wide]


def write_budgets(folder: Path) -> None:
    """Compile everything with both releases and write what came out."""
    table: dict[str, dict[str, dict[str, list[float]]]] = {}
    old = old_triton(folder / OLD)
    for release, triton in ((installed_release(), None), ("3.6", old)):
        for key, got in compiled(TARGETS, folder / "compiled", triton).items():
            case, _, sm = key.rpartition(", sm_")
            figures = [got["per_weight"] or got["instructions"], got["registers"]]
            table.setdefault(release, {}).setdefault(case, {})[sm] = figures
    lines = []
    for release, cases in table.items():
        rows = ",\n".join(f"  {json.dumps(c)}: {json.dumps(f)}" for c, f in cases.items())
        lines.append(f" {json.dumps(release)}: {{\n{rows}\n }}")
    BUDGETS_FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        write_budgets(Path(temporary))
