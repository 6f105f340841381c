"""Tiny quantized models in a real vLLM."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VARIABLE = "VQLLM_VLLM_ENVIRONMENT"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    not os.environ.get(VARIABLE),
    reason=f"{VARIABLE} names no environment with vLLM: python eval/vllm_environment.py DIR",
)
def test_logits_are_those_of_transformers_and_bad_input_is_refused(tmp_path: Path) -> None:
    script = ROOT / "eval/vllm_check.py"
    command = [sys.executable, script, os.environ[VARIABLE], "--work", tmp_path]
    done = subprocess.run([*command, "--steps", "smallest"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
