"""Recipes write the bytes that they wrote when `same_bytes.json` was recorded.

A change that is meant to write others records them anew, and says so where it is described:

    python -m tests.support.same_bytes --output tests/e2e/same_bytes.json --recipes a,b,c

with the names that are in the file.
"""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support.params import slow
from tests.support.same_bytes import ANOTHER_MACHINE, FIXED

ROOT = Path(__file__).parents[2]
RECORDED = Path(__file__).with_name("same_bytes.json")
QUICK = (
    "rtn-4bit",  # uniform, to the nearest
    "gptvq-3bit",  # k-means in groups, refitted while coding
    "e8p-2bit-small",  # a lattice behind Hadamard transforms, embeddings and head
    "quantease-3bit",  # outliers; coordinate descent
    "d4-4bit",  # two stages
    "kmeans-2bit",
    "convolutional-2bit",
    # A trellis, scales, bits that are allocated, Hessians of outputs; layers are trained while they
    # are rounded, and scales afterwards.
    "tuned-2bit",
    "end-to-end",  # tuning of a checkpoint
)
MORE = (
    "comq-4bit",
    "pyramid-2bit",
    "e8-lattice-2bit",
    "jlcm-2bit",
    "leech-2bit",
    "additive-2bit",  # beam search
    "vptq-3bit",  # columns in another order, two codecs
    "spread-2bit",
    "pv",
    "codebook",
)
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "numba")
"""What bytes depend on. They are recorded with the versions of constraints.txt."""


def other_versions() -> dict[str, str]:
    """The installed versions of `PACKAGES` that are not those of constraints.txt."""
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    installed = {name: version(name).partition("+")[0] for name in PACKAGES}
    return {name: found for name, found in installed.items() if found != pinned[name]}


@pytest.mark.parametrize("names", [QUICK, slow(MORE)], ids=["quick", "more"])
def test_recipes_write_the_bytes_that_are_recorded(names: tuple[str, ...], tmp_path: Path) -> None:
    if others := other_versions():
        pytest.skip(f"recorded with other versions than {others}")
    output = tmp_path / "found.json"
    command = [sys.executable, "-m", "tests.support.same_bytes", "--recipes", ",".join(names)]
    command += ["--output", output, "--against", RECORDED]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **FIXED, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    if done.returncode == ANOTHER_MACHINE:
        pytest.skip("this machine computes in another way than the one that recorded them")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    assert len(found) == 1 + len(names)
