"""Imports point one way: each part of the package knows only what lies below it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from vqllm import extend

ROOT = Path(__file__).parents[2]

TOP = ("errors", "_version", "<packages>", "recipe", "types", "extend", "api", "cli", "__main__")
"""Files beside the packages, and where the packages stand among them: each may import what stands
before it. `vqllm` itself registers with transformers and imports its public names when asked."""

TO_RUN_A_MODEL = {"torch", "transformers", "safetensors"}
KERNELS_MAY_USE = {"torch", "triton"}

Imports = dict[str, set[str]]


def imports_of(root: Path) -> Imports:
    """Everything that each module below `root` imports, at its top or inside functions."""
    found: Imports = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = set(_imported(ast.parse(path.read_text(encoding="utf-8"))))
    return found


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            yield from (_home(f"{node.module}.{alias.name}") for alias in node.names)
        yield from _imported(node)


def _home(target: str) -> str:
    """Where a name is defined that is imported from `vqllm.extend`, which only looks it up there:
    a codec may import those names that it may import from their homes."""
    home = extend.HOMES.get(target.removeprefix("vqllm.extend."))
    return home.replace(":", ".").rstrip(".") if home and "vqllm.extend." in target else target


def allowed(root: Path) -> dict[str, set[str]]:
    """The packages that each package says that it may import, in its `__init__`."""
    found = {}
    for file in sorted(root.glob("*/__init__.py")):
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        line = re.search(r"^May import: (.*?)\.$", docstring, re.MULTILINE | re.DOTALL)
        assert line, f"{file} does not say what it may import"
        names = set(re.split(r",\s*", line[1])) - {"nothing"}
        found[file.parent.name] = names
    return found


def used(imports: Imports) -> dict[str, set[str]]:
    """The packages and files at the top that each of them imports."""
    found: dict[str, set[str]] = {}
    for module, targets in imports.items():
        own = found.setdefault(_part(module), set())
        own |= {_part(target) for target in targets if target.startswith("vqllm.")}
    return {part: own - {part, "__version__"} for part, own in found.items() if part}


def wrong_ways(imports: Imports, packages: dict[str, set[str]]) -> list[str]:
    """Imports between parts of vqllm that do not point down."""
    wrong = []
    for part, others in used(imports).items():
        place = TOP.index("<packages>" if part in packages else part)
        for other in sorted(others):
            if part in packages and other in packages:
                fine = other in packages[part]
            else:
                fine = TOP.index("<packages>" if other in packages else other) < place
            if not fine:
                wrong.append(f"{part} imports {other}")
    return wrong


def _part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.fixture(scope="module")
def package() -> Imports:
    return imports_of(ROOT / "vqllm")


@pytest.fixture(scope="module")
def kernels() -> Imports:
    return imports_of(ROOT / "kernels" / "vqllm_kernels")


@pytest.fixture(scope="module")
def packages() -> dict[str, set[str]]:
    return allowed(ROOT / "vqllm")


def test_imports_point_down(package: Imports, packages: dict[str, set[str]]) -> None:
    assert wrong_ways(package, packages) == []


def test_packages_say_no_more_than_they_import(
    package: Imports, packages: dict[str, set[str]]
) -> None:
    found = used(package)
    assert {name: own - found[name] for name, own in packages.items() if own - found[name]} == {}


def test_no_circle_between_packages(packages: dict[str, set[str]]) -> None:
    assert set(TopologicalSorter(packages).static_order()) == set(packages)


def test_quantization_does_without_distillation(packages: dict[str, set[str]]) -> None:
    below, todo = set(), ["quantization"]
    while todo:
        below |= packages[todo[-1]]
        todo += packages[todo.pop()]
    assert "calibration" in below
    assert "distillation" not in below


def test_the_top_is_a_handful_of_files() -> None:
    assert len(list((ROOT / "vqllm").glob("*.py"))) < 10


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("vqllm.codecs.e8p", "vqllm.rounding.ldlq"),
        ("vqllm.calibration.layer_stream", "vqllm.quantization.loop.Job"),
        ("vqllm.runtime.linear", "vqllm.integrations.transformers"),
        ("vqllm.core.bits", "vqllm.codecs"),
        ("vqllm.recipes.schema", "vqllm.types.Codec"),
        ("vqllm.codecs.e8p", _home("vqllm.extend.ROUNDINGS")),
        ("vqllm.codecs.e8p", "vqllm.extend"),
        ("vqllm.api", "vqllm.cli.app"),
    ],
)
def test_an_import_that_points_up_is_found(
    module: str, target: str, packages: dict[str, set[str]]
) -> None:
    assert len(wrong_ways({module: {target}}, packages)) == 1


WITH_NUMBA = (
    "vqllm_kernels.compilers",
    "vqllm_kernels.lut.gather_numba",
    "vqllm_kernels.lut.permute_numba",
    "vqllm_kernels.compiled",
    "vqllm_kernels.keep_code",
    "vqllm_kernels.cpu",
)
"""Modules, and packages, that run only where numba is installed, and are not missed where it is
not."""
MAY_LACK = {"numba", "llvmlite", "numpy"}


def may_lack(module: str, target: str) -> bool:
    """Whether an import of `module` fails where numba is not installed, and may."""
    return target.split(".")[0] in MAY_LACK and any(
        module == name or module.startswith(name + ".") for name in WITH_NUMBA
    )


def test_kernels_are_imported_without_numba() -> None:
    """Formats name their kernels, and import what numba compiles when they are asked for."""
    code = """
import sys
for name in ("numba", "llvmlite"):
    sys.modules[name] = None
import torch
from vqllm_kernels import dispatch, formats
from vqllm_kernels.trellis.spec import TrellisSpec
spec = TrellisSpec(tile_rows=64, code="bytes2", tile_bits=512, state_bits=14, step_weights=2)
tensors = {k: torch.zeros(t.shape, dtype=t.dtype) for k, t in spec.layout(64, 8).items()}
print(dispatch.matmul(torch.ones(1, 8).bfloat16(), tensors, spec, 64, 8).shape)
print(dispatch.choices()[-1].implementation, dispatch.choices()[-1].reason)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "reference packed declines: numba cannot be imported" in done.stdout


def test_kernels_need_torch_and_triton_only(kernels: Imports) -> None:
    used = {
        target.split(".")[0]
        for module, targets in kernels.items()
        for target in targets
        if not may_lack(module, target)
    }
    others = used - sys.stdlib_module_names - {"vqllm_kernels"}
    assert others <= KERNELS_MAY_USE
    assert "torch" in others


def test_running_a_model_needs_little(package: Imports, kernels: Imports) -> None:
    everything = package | kernels
    reached, todo = set(), ["vqllm.integrations.transformers", "vqllm.runtime"]
    others = set()
    while todo:
        module = todo.pop()
        reached.add(module)
        for target in everything[module]:
            inside = _longest_module(target, everything)
            if inside and inside not in reached:
                todo.append(inside)
            elif not inside and not may_lack(module, target):
                others.add(target.split(".")[0])
    assert {"vqllm.runtime.linear", "vqllm.checkpoint.format", "vqllm_kernels.linear"} <= reached
    assert others - sys.stdlib_module_names <= TO_RUN_A_MODEL | KERNELS_MAY_USE


def _longest_module(target: str, modules: Imports) -> str:
    while target and target not in modules:
        target = target.rpartition(".")[0]
    return target


def test_kernels_folder_is_no_package() -> None:
    # A package named `kernels` in the working directory would hide Hugging Face's own.
    assert not (ROOT / "kernels" / "__init__.py").exists()
