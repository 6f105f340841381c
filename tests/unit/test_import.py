"""What importing the package does, and the names that it gives."""

import importlib.machinery
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vqllm
from vqllm.integrations import _autoregister

PUBLIC = {
    "Checkpoint",
    "CheckpointError",
    "ModelError",
    "Recipe",
    "RecipeError",
    "VqllmError",
    "compare",
    "dequantize",
    "describe",
    "inspect",
    "load",
    "quantize",
    "set_weight_cache",
    "tune",
}


def run(code: str) -> list[str]:
    """Words printed by a fresh interpreter."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_is_light_and_touches_nothing() -> None:
    code = """
import os, socket, sys
def refuse(*args, **kwargs):
    raise AssertionError(args)
socket.socket = refuse
os._Environ.__getitem__ = os._Environ.__setitem__ = os._Environ.__contains__ = refuse
before = set(sys.modules)
import vqllm
print(*(set(sys.modules) - before - set(sys.stdlib_module_names)))
"""
    new = {name for name in run(code) if name.partition(".")[0] not in sys.stdlib_module_names}
    own = {"vqllm", "vqllm._version", "vqllm.integrations", "vqllm.integrations._autoregister"}
    assert new == own


def test_using_every_public_name_leaves_cuda_alone() -> None:
    code = """
import vqllm
for name in vqllm.__all__:
    getattr(vqllm, name)
import torch
print(torch.cuda.is_initialized())
"""
    assert run(code) == ["False"]


def test_public_names_are_these() -> None:
    assert set(vqllm.__all__) == PUBLIC
    assert len(vqllm.__all__) == len(PUBLIC)
    assert set(vqllm.__dir__()) >= PUBLIC
    for name in PUBLIC:
        assert getattr(vqllm, name).__doc__, f"{name} has no docstring"
    with pytest.raises(AttributeError, match="module 'vqllm' has no attribute 'quantise'"):
        _ = vqllm.quantise


def test_version_is_that_of_the_package() -> None:
    pyproject = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())
    assert vqllm.__version__ == pyproject["project"]["version"]


def test_waits_for_transformers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the one that importing the package left, which waits until transformers is imported.
    others = [f for f in sys.meta_path if not type(f).__module__.startswith("vqllm.")]
    monkeypatch.setattr(sys, "meta_path", others)
    monkeypatch.delitem(sys.modules, _autoregister.TARGET, raising=False)
    ordinary = list(sys.meta_path)
    _autoregister.install()
    _autoregister.install()
    waiting = [finder for finder in sys.meta_path if finder not in ordinary]
    assert len(waiting) == 1
    assert waiting[0].find_spec("transformers", None) is None
    assert waiting[0] in sys.meta_path
    spec = waiting[0].find_spec(_autoregister.TARGET, None)
    assert isinstance(spec, importlib.machinery.ModuleSpec)
    assert spec.name == _autoregister.TARGET
    assert sys.meta_path == ordinary
