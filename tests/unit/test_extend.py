"""The names that authors of codecs, transforms and rounding rules import."""

import ast
from pathlib import Path

import pytest

from tests.support.installed import run_python
from vqllm import extend

NAMES = {
    *("Codec", "ScaledCodec", "SearchableCodec", "OutlierCodec", "Transform", "Rounding"),
    *("OutputRounding", "Tuning", "Settings", "Field", "Point", "State"),
    *("CODECS", "TRANSFORMS", "ROUNDINGS", "TUNINGS"),
    *("FormatSpec", "register_format", "TensorLayout", "LutSpec", "TransformSpec", "HadamardSpec"),
    *("ScaleSpec", "CodedScaleSpec", "PermutationSpec", "BlockDiagonalSpec"),
    *("pack_bits", "unpack_bits", "packed_bytes"),
    *("tiles", "linalg", "codec_bench"),
    *("build_part", "check_finite", "nearest_entry", "root_mean_square", "weigh"),
    *("NumericalError", "RecipeError", "VqllmError"),
}


def test_names_are_these() -> None:
    assert set(extend.__all__) == set(extend.HOMES) == NAMES
    assert set(dir(extend)) >= NAMES
    with pytest.raises(AttributeError, match=r"module 'vqllm\.extend' has no attribute 'Codex'"):
        _ = extend.Codex


def test_every_name_is_explained() -> None:
    assert extend.__doc__
    words = set(extend.__doc__.replace(",", " ").replace("`", " ").replace(";", " ").split())
    assert words >= NAMES


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(extend.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            seen[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    homes = {name: home.replace(":", ".").rstrip(".") for name, home in extend.HOMES.items()}
    assert seen == homes


def test_importing_is_light_and_no_name_needs_transformers() -> None:
    code = """
import sys, vqllm.extend as extend
assert "torch" not in sys.modules
from vqllm.extend import *
assert "torch" in sys.modules and "transformers" not in sys.modules
print(*[name for name in extend.__all__ if name not in globals()])
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
