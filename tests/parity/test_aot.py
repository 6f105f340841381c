"""What the compiler makes of the kernels on NVIDIA targets, without a device.

The kernels are compiled in processes of their own, one for each target at the same time (see
`aot`). Budgets hold for one version of triton, whose code generation moves by 10 to 40 % between
releases; with another version they are checked against themselves doubled, the rest as it is.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = (80, 90)
BUDGET_VERSION = "3.9."

MATMULS = {
    # instructions a weight on sm_80 and sm_90, most registers
    "e8p fp16": (4.01, 3.98, 128),
    "e8p bf16, 16 tokens": (5.09, 4.85, 128),
    "e8p fp16, 64 tokens": (4.95, 4.97, 168),
    "e8p fp32": (7.34, 7.63, 128),
    "e81b bf16": (3.15, 2.86, 128),
    "lut 1x8, 8 bit, fp16": (1.71, 1.81, 128),
    "lut 1x4, 8 bit, bf16": (3.45, 3.52, 128),
    "lut 8x1, 16 bit, fp16": (1.84, 1.83, 128),
    "lut 6x1, 12 bit, fp16": (2.54, 2.60, 128),
    "lut 8x1, 8 bit, fp16, 32 tokens": (2.30, 2.31, 144),
}
DECODES = {
    # instructions a weight of the whole kernel, which has no loop
    "e8p decode": (12.0, 12.0, 64),
    "lut 1x8, 8 bit, decode": (4.5, 4.5, 64),
}
TRANSFORMS = {
    # instructions of a lane in one step of the loop
    "hadamard 4096, fp16": (795, 565, 192),
    "hadamard 11008, bf16": (909, 632, 192),
    "hadamard 14336, fp32": (946, 1156, 192),
    "hadamard, blocks of 128, bf16": (896, 936, 128),
}
SEARCHES = {
    # instructions a state
    "viterbi 2^16, 2 bits": (7.25, 7.25, 64),
    "viterbi 2^16, 4 bits": (6.82, 6.69, 64),
    "viterbi 2^12, 2.5 bits": (7.60, 7.88, 64),
    "viterbi 2^16, pairs, 2 bits": (14.1, 12.9, 80),
}
BUDGETS = MATMULS | DECODES | TRANSFORMS | SEARCHES


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """ "kernel, sm_target" -> what `aot` measured."""
    triton = pytest.importorskip("triton")
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm").exists():
        pytest.skip("this triton comes without the NVIDIA tools")
    cache = request.config.cache
    folder = cache.mkdir("triton") if cache else tmp_path_factory.mktemp("triton")
    env = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    script = Path(__file__).with_name("aot.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(sm)],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for sm in TARGETS
    ]
    results: dict = {}
    for process in processes:
        out, err = process.communicate(timeout=500)
        assert process.returncode == 0, err
        results |= json.loads(out)
    return results


@pytest.fixture(params=TARGETS, ids=lambda sm: f"sm_{sm}")
def sm(request: pytest.FixtureRequest) -> int:
    return request.param


def budget(name: str, sm: int) -> float:
    import triton

    limit = 1.1 * BUDGETS[name][TARGETS.index(sm)]
    return limit if triton.__version__.startswith(BUDGET_VERSION) else 2 * limit


@pytest.mark.parametrize("name", BUDGETS)
def test_nothing_is_spilled(figures, name, sm):
    got = figures[f"{name}, sm_{sm}"]
    assert got["stack"] == 0
    assert got["registers"] <= BUDGETS[name][2]
    assert got["shared"] <= 48 * 1024


@pytest.mark.parametrize("name", [*MATMULS, *DECODES, *SEARCHES])
def test_instructions_a_weight_stay_in_budget(figures, name, sm):
    assert figures[f"{name}, sm_{sm}"]["per_weight"] <= budget(name, sm)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_instructions_a_step_stay_in_budget(figures, name, sm):
    assert figures[f"{name}, sm_{sm}"]["instructions"] <= budget(name, sm)


@pytest.mark.parametrize("name", MATMULS)
def test_codes_are_loaded_16_bytes_at_a_time(figures, name, sm):
    loads = figures[f"{name}, sm_{sm}"]["global_loads"]
    # Codes, and only codes, are loaded with the hint to evict them first.
    assert [width for width in loads if ".EF" in width] == ["LDG.E.EF.128"]


@pytest.mark.parametrize("name", [*MATMULS, *TRANSFORMS])
def test_tensor_cores_are_used(figures, name, sm):
    assert figures[f"{name}, sm_{sm}"]["mma"] > 0


@pytest.mark.parametrize("name", [n for n in MATMULS if "fp32" not in n])
def test_operands_stay_in_registers(figures, name, sm):
    got = figures[f"{name}, sm_{sm}"]
    assert got["shuffles"] == 0
    assert got["shared_memory"] == 0


@pytest.mark.parametrize("name", DECODES)
def test_weights_are_stored_16_bytes_at_a_time(figures, name, sm):
    assert figures[f"{name}, sm_{sm}"]["global_stores"] == ["STG.E.128"]
