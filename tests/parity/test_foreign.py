"""Formats of other tools against the programs that their authors or others wrote.

`VQLLM_ORACLES` names the Python of an environment that has them; `foreign_oracles.py` says how to
make it. The files of the default tests are of one seed; here is another.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.support.foreign import DATA, cases, linear_of

pytestmark = pytest.mark.slow


def test_other_random_linears_are_decoded_as_others_decode_them(tmp_path: Path) -> None:
    python = os.environ.get("VQLLM_ORACLES")
    if not python:
        pytest.skip("VQLLM_ORACLES names no Python with aqlm, gptqmodel and compressed-tensors")
    script = Path(__file__).with_name("foreign_oracles.py")
    # The environment is another one: nothing of this one's path may come before its own.
    paths = {"PYTHONPATH": os.environ.get("VQLLM_ORACLES_PATH", "")}
    command = [python, str(script), "1", str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, **paths})
    found = cases(tmp_path)
    assert {case.name for case in found} == {case.name for case in cases(DATA)}
    for case in found:
        dense = linear_of(case).decode(torch.float32)
        torch.testing.assert_close(dense, case.expected.float(), rtol=case.rtol, atol=case.atol)
