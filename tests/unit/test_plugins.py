"""Codecs, transforms, rounding rules and formats that other installed packages bring."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vqllm
from tests.support.installed import pip_install, run_python, write_package
from tests.support.tiny import save_tiny
from vqllm.codecs import CODECS
from vqllm.core.protocols import Codec
from vqllm.core.registry import Registry
from vqllm.errors import CheckpointError, RecipeError
from vqllm.rounding import ROUNDINGS
from vqllm.transforms import TRANSFORMS
from vqllm_kernels import formats

SIGN = '''
"""Signs of weights times their mean magnitude, in a format of their own."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vqllm.extend import (
    CODECS,
    Codec,
    FormatSpec,
    Point,
    Rounding,
    TensorLayout,
    Transform,
    TransformSpec,
    pack_bits,
    packed_bytes,
    register_format,
    tiles,
    unpack_bits,
)


@register_format
@dataclass(frozen=True, kw_only=True)
class SignSpec(FormatSpec):
    format_id: ClassVar[str] = "sign-v1"

    @property
    def tile(self):
        return (1, 1)

    def layout(self, rows, cols):
        codes = TensorLayout((rows, packed_bytes(cols, 1)), torch.uint8, "codes", by_tile_row=True)
        return {"codes": codes, "scale": TensorLayout((1,), torch.float32, "side")}

    def decode(self, tensors, rows, cols):
        return tensors["scale"] * (1 - 2 * unpack_bits(tensors["codes"], 1, cols))


@CODECS.register("sign")
class Sign(Codec):
    points: ClassVar = (Point(label="signs", options={}, mse=1 - 2 / math.pi, source="integral"),)
    type: Literal["sign"] = "sign"

    @property
    def tile(self):
        return (1, 1)

    def spec(self):
        return SignSpec()

    def fit(self, X_IJE, weight_IJE, generator):
        return {"scale": X_IJE.abs().mean().reshape(1)}

    def encode(self, X_IJE, state, col=0, weight_E=None):
        return (X_IJE < 0).int()

    def decode(self, codes_IJM, state, col=0):
        return state["scale"] * (1 - 2 * codes_IJM)

    def pack(self, codes_IJM, state):
        return {"codes": pack_bits(codes_IJM[..., 0], 1), **state}

    def unpack(self, tensors, rows, cols):
        codes_IJM = unpack_bits(tensors["codes"], 1, cols)[..., None]
        return codes_IJM, {"scale": tensors["scale"]}


class Plain(Rounding):
    type: Literal["plain"] = "plain"

    def __call__(self, W_RC, H_CC, codec, state):
        return codec.encode(tiles.to_tiles(W_RC, codec.tile), state), state


@dataclass(frozen=True, kw_only=True)
class FlipSpec(TransformSpec):
    kind: ClassVar[str] = "flip"

    def layout(self):
        return {}

    def apply(self, v, tensors):
        return v.flip(-1)

    apply_inverse = apply_transpose = apply_inverse_transpose = apply


class Flip(Transform):
    type: Literal["flip"] = "flip"

    def spec(self, size):
        return FlipSpec(side=self.side, size=size)

    def forward(self, W_RC, H_CC, generator):
        spec = self.spec(self._size(W_RC))
        return spec.forward(W_RC, {}), spec.forward_hessian(H_CC, {}), {}
'''
PYPROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "vqllm-sign"
version = "0.1.0"

[project.entry-points]
"vqllm.codecs" = {sign = "vqllm_sign"}
"vqllm.roundings" = {plain = "vqllm_sign:Plain"}
"vqllm.transforms" = {flip = "vqllm_sign:Flip"}
"vqllm.formats" = {sign-v1 = "vqllm_sign"}
"vqllm.transform_kinds" = {flip = "vqllm_sign:FlipSpec"}

[tool.setuptools]
py-modules = ["vqllm_sign"]
"""
RECIPE = """
version: 1
name: sign
transforms: [{type: flip, side: both}]
codec: {type: sign}
rounding: {type: plain}
calibration: {sequences: 4, length: 32}
"""
LOADING = """
import sys, torch, vqllm
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert torch.isfinite(model(torch.arange(3, 30)[None]).logits).all()
print({m.spec.format.format_id for m in model.modules() if isinstance(m, vqllm.runtime.VQLinear)})
"""
GROUP = "vqllm.codecs"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package above and with one that cannot be imported."""
    project = tmp_path_factory.mktemp("project") / "vqllm-sign"
    project.mkdir()
    (project / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    (project / "vqllm_sign.py").write_text(SIGN, encoding="utf-8")
    target = pip_install(project, tmp_path_factory.mktemp("installed") / "packages")
    points = {GROUP: {"shattered": "vqllm_shattered"}}
    return write_package(target, "vqllm-shattered", points, vqllm_shattered="import nowhere")


def test_commands_find_what_is_installed(installed: Path, tmp_path: Path) -> None:
    listed = run_python("-m", "vqllm", "codecs", path=(installed,))
    assert listed.returncode == 0, listed.stderr
    for name in ("sign", "plain", "flip", "e8p", "ldlq"):
        assert f" {name} " in listed.stdout
    assert listed.stderr.count("'shattered' of vqllm-shattered cannot be used") == 1
    assert "No module named 'nowhere'" in listed.stderr
    assert "Traceback" not in listed.stderr
    source = save_tiny(tmp_path / "tiny", num_hidden_layers=1)
    (tmp_path / "sign.yaml").write_text(RECIPE, encoding="utf-8")
    quantize = ("-m", "vqllm", "quantize", source, "--recipe", "sign.yaml", "--no-eval", "--output")
    done = run_python(*quantize, "out", path=(installed,), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = run_python("-c", LOADING, tmp_path / "out", path=(installed,))
    assert loaded.returncode == 0, loaded.stderr
    assert "sign-v1" in loaded.stdout
    refused = run_python(
        *(*quantize, "other", "--set", "codec={type: shattered}"), path=(installed,), cwd=tmp_path
    )
    assert refused.returncode == 2
    assert "pip uninstall vqllm-shattered" in refused.stderr
    # A format of its own needs the package to be read, and the message says so.
    with pytest.raises(CheckpointError, match=r"unknown format 'sign-v1'.* is installed"):
        vqllm.load(tmp_path / "out")


def test_groups_of_the_registries() -> None:
    found = [registry._group for registry in (CODECS, TRANSFORMS, ROUNDINGS)]
    assert found == ["vqllm.codecs", "vqllm.transforms", "vqllm.roundings"]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Registry[Codec]]:
    """A registry as at the start of a process, with one codec; packages are found in `tmp_path`."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    fresh: Registry[Codec] = Registry("codec", Codec, GROUP)
    fresh.register("own")(CODECS.get("e8p"))
    monkeypatch.setattr("vqllm.codecs.base.CODECS", fresh)
    yield fresh
    for name in set(sys.modules) - before:
        del sys.modules[name]


CLASS = "from vqllm.codecs.d4 import D4 as Found"
REGISTERS = """
from vqllm.codecs.base import CODECS
from vqllm.codecs.e8p import E8P
for name in {names}:
    CODECS.register(name)(E8P)
"""


def test_a_module_registers_and_a_class_is_registered(
    registry: Registry[Codec], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    points = {GROUP: {"first": "plugin_a", "third": "plugin_b:Found"}}
    text = REGISTERS.format(names=["first", "second"])
    write_package(tmp_path, "package-a", points, plugin_a=text, plugin_b=CLASS)
    assert registry.get("own") is CODECS.get("e8p")
    assert "plugin_a" not in sys.modules, "nothing is loaded for a name that is there"
    assert list(registry) == ["first", "own", "second", "third"]
    assert registry.get("third") is CODECS.get("d4")
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("value", "text", "reason"),
    [
        ("plugin_c", "import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("plugin_c", "1 / 0", "ZeroDivisionError: division by zero"),
        ("plugin_c", REGISTERS.format(names=["wrong", "own"]), "codec 'own' is registered twice"),
        ("plugin_c", "", "plugin_c registers no 'wrong'"),
        ("plugin_c:Missing", "", "has no attribute 'Missing'"),
        ("plugin_c:Found", "class Found: pass", "is not derived from Codec"),
    ],
)
def test_a_broken_package_is_named_and_does_no_harm(
    registry: Registry[Codec],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    value: str,
    text: str,
    reason: str,
) -> None:
    write_package(tmp_path, "package-c", {GROUP: {"wrong": value}}, plugin_c=text)
    points = {GROUP: {"right": "plugin_d:Found"}}
    write_package(tmp_path, "package-d", points, plugin_d=CLASS)
    for _ in range(2):
        assert list(registry) == ["own", "right"]
        with pytest.raises(RecipeError) as raised:
            registry.get("wrong")
        for part in ("'wrong' of package-c", reason, GROUP, "pip uninstall package-c"):
            assert part in str(raised.value)
        with pytest.raises(RecipeError, match=r"unknown codec 'rigth'.*'right'.*Known: own, right"):
            registry.get("rigth")
    assert caplog.record_tuples == [
        ("vqllm_kernels.plugins", logging.WARNING, str(raised.value)),
    ]


def test_a_name_of_two_packages_belongs_to_none(registry: Registry[Codec], tmp_path: Path) -> None:
    for letter in "ef":
        points = {GROUP: {"wanted": f"plugin_{letter}:Found"}}
        write_package(tmp_path, f"package-{letter}", points, **{f"plugin_{letter}": CLASS})
    assert "wanted" not in registry
    with pytest.raises(RecipeError, match="of package-e and of package-f cannot be used"):
        registry.get("wanted")


def test_a_name_that_is_taken_keeps_its_class(
    registry: Registry[Codec], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_package(tmp_path, "package-g", {GROUP: {"own": "plugin_g:Found"}}, plugin_g=CLASS)
    assert list(registry) == ["own"]
    assert registry.get("own") is CODECS.get("e8p")
    assert "the name 'own' is that of" in caplog.text


def test_a_format_of_a_broken_package_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    points = {"vqllm.formats": {"wrong-v1": "plugin_h"}}
    write_package(tmp_path, "package-h", points, plugin_h="import nowhere")
    formats._load_plugins.cache_clear()
    try:
        with pytest.raises(ValueError, match="'wrong-v1' of package-h cannot be used"):
            formats.from_dict({"format": "wrong-v1"})
        assert "wrong-v1" not in formats.known_formats()
    finally:
        formats._load_plugins.cache_clear()


def test_no_format_is_registered_twice() -> None:
    known = type(formats.from_dict({"format": "e8p-v1"}))
    assert formats.register(known) is known
    with pytest.raises(ValueError, match="format 'e8p-v1' is registered twice"):
        formats.register(type("Other", (known,), {}))
