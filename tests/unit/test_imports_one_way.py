"""Imports point one way: each part of the package knows only what lies below it."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LEVELS: list[set[str]] = [
    # the common ground: these may import each other
    {
        *("bits", "errors", "hadamard", "least_squares", "linalg", "linears", "loading", "memory"),
        *("metrics", "pareto", "processes", "registry", "resources", "rng", "texts", "tiles"),
        "types",
    },
    # the parts, which meet only above; no part imports another
    {
        *("allocation", "cache", "calibration", "checkpoint", "codecs", "evaluation", "progress"),
        *("report", "rounding", "runtime", "transforms", "tuning"),
    },
    {"gguf_model", "integrations", "moved", "progress_bar", "recipe"},
    {"codec_bench", "coded", "demo", "job", "rows", "speed", "survey", "target", "teacher"},
    {"fitting"},
    {"student"},
    {"group"},
    {"expected_loss", "layer_training", "outside"},
    {"models", "preflight"},
    {"foresight"},
    {"pipeline", "running"},
    {"quantization"},
    {"teaching"},
    {"comparison"},
    {"api"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}

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
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from _imported(node)


def wrong_ways(imports: Imports) -> list[str]:
    """Imports between parts of vqllm that do not point down."""
    wrong = []
    for module, targets in imports.items():
        source = _part(module)
        for target in sorted(targets):
            if not target.startswith("vqllm.") or not source:
                continue
            part = _part(target)
            if part in (source, "__version__"):
                continue
            both_common = LEVEL[source] == LEVEL[part] == 0
            if LEVEL[part] >= LEVEL[source] and not both_common:
                wrong.append(f"{module} imports {target}")
    return wrong


def _part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.fixture(scope="module")
def package() -> Imports:
    return imports_of(ROOT / "vqllm")


@pytest.fixture(scope="module")
def kernels() -> Imports:
    return imports_of(ROOT / "kernels" / "vqllm_kernels")


def test_every_part_has_a_level(package: Imports) -> None:
    parts = {_part(module) for module in package} - {""}
    assert parts - LEVEL.keys() == set(), "give the new part a level above"
    assert len(LEVEL) == sum(len(names) for names in LEVELS)


def test_imports_point_down(package: Imports) -> None:
    assert wrong_ways(package) == []


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("vqllm.codecs.e8p", "vqllm.rounding.ldlq"),
        ("vqllm.calibration.layer_stream", "vqllm.quantization.loop.Job"),
        ("vqllm.runtime.linear", "vqllm.integrations.transformers"),
        ("vqllm.core.bits", "vqllm.codecs"),
        ("vqllm.api", "vqllm.cli.app"),
    ],
)
def test_an_import_that_points_up_is_found(module: str, target: str) -> None:
    assert wrong_ways({module: {target}}) == [f"{module} imports {target}"]


WITH_NUMBA = (
    "vqllm_kernels.lut.cpu",
    "vqllm_kernels.lut.gather_numba",
    "vqllm_kernels.lut.permute_numba",
)
"""What runs only where numba is installed, and is not missed where it is not."""
MAY_LACK = {"numba", "llvmlite", "numpy"}


def test_kernels_need_torch_and_triton_only(kernels: Imports) -> None:
    used = {
        target.split(".")[0]
        for module, targets in kernels.items()
        for target in targets
        if not (module in WITH_NUMBA and target.split(".")[0] in MAY_LACK)
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
            elif not inside and not (module in WITH_NUMBA and target.split(".")[0] in MAY_LACK):
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
