"""The worked example of docs/tutorial_codec.md: every block of the page, run as it stands."""

import ast
import importlib.util
import inspect
import itertools
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import vqllm
from tests.conformance import test_codecs as battery
from tests.support.installed import pip_install, run_python
from tests.support.tiny import save_tiny
from vqllm import cli, recipes
from vqllm import codecs as codecs_package
from vqllm.codecs import CODECS
from vqllm.core import resources
from vqllm.evaluation import codec_bench

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial_codec.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL)
BY_TITLE = {title: body for _, title, body in BLOCKS if title}
NAME, RECIPE = "hexagonal", "hexagonal-3bit"
SMALL = "calibration: {sequences: 4, length: 32}\n"


MODULE = f"{codecs_package.__name__}.{NAME}"
IN_TREE = importlib.util.find_spec(MODULE) is not None
"""Whether a reader has followed the page in this very tree: then the codec there is tested."""


@pytest.fixture(scope="module", autouse=True)
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The codec and its recipe as if they were in the tree, until this module's end."""
    shipped = tmp_path_factory.mktemp("shipped") / "recipes"
    shutil.copytree(resources.recipes_dir(), shipped)
    if RECIPE not in recipes.available():
        (shipped / "codecs" / f"{RECIPE}.yaml").write_text(
            BY_TITLE[f"recipes/codecs/{RECIPE}.yaml"], "utf-8"
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resources, "recipes_dir", lambda: shipped)
        if not IN_TREE:
            if NAME in CODECS:  # of an installed package
                patch.delitem(CODECS._parts, NAME)
            file = tmp_path_factory.mktemp("codecs") / "hexagonal.py"
            file.write_text(BY_TITLE["vqllm/codecs/hexagonal.py"], encoding="utf-8")
            import_as(MODULE, file, patch)
        for i, point in enumerate(CODECS.get(NAME).points):
            values = {"type": NAME, **point.options}
            patch.setitem(battery.CONFIGURATIONS, f"{NAME}-{i}", values)
        yield
        if not IN_TREE:
            del CODECS._parts[NAME]


def import_as(module_name: str, file: Path, patch: pytest.MonkeyPatch) -> None:
    """Import a file as a submodule of the codecs' package."""
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, module_name, module)
    patch.setattr(codecs_package, NAME, module, raising=False)
    spec.loader.exec_module(module)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty working directory with a tiny model under the name `demo`."""
    path = tmp_path_factory.mktemp("work")
    save_tiny(path / "tiny", num_hidden_layers=1)
    return path


def as_tiny(text: str, folder: Path) -> str:
    """A command or a script, with the tiny model in place of the demo model."""
    return re.sub(r'(?<=["\s])demo(?=["\s])', str(folder / "tiny"), text)


def commands(wanted: str = "") -> list[list[str]]:
    """The lines for a shell that call vqllm, in blocks without a title or with the one given."""
    blocks = [body for kind, title, body in BLOCKS if kind == "sh" and title == wanted]
    lines = [line for body in blocks for line in body.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("vqllm ")]


def checks() -> list[Any]:
    """The battery's tests of one codec, with all arguments but the configuration's name."""
    cases = []
    for check_name, check in inspect.getmembers(battery, inspect.isfunction):
        arguments = list(inspect.signature(check).parameters)
        if check_name.startswith("test_") and "name" in arguments:
            others = [_values(check, argument) for argument in arguments if argument != "name"]
            for values in itertools.product(*others):
                label = "-".join([check_name, *map(str, values)])
                cases.append(pytest.param(check, values, id=label))
    return cases


def _values(check: Callable[..., None], argument: str) -> list[Any]:
    """Those without marks: the quick ones."""
    marks = [m for m in check.pytestmark if m.name == "parametrize" and m.args[0] == argument]
    return [value for value in marks[0].args[1] if not isinstance(value, type(pytest.param()))]


def test_the_page_has_what_it_promises() -> None:
    files = [title for title in BY_TITLE if "/" in title]
    assert files == [
        "vqllm/codecs/hexagonal.py",
        "vqllm/codecs/__init__.py",
        "recipes/codecs/hexagonal-3bit.yaml",
        "vqllm-hexagonal/pyproject.toml",
    ]
    assert [c[1] for c in commands()] == ["codecs", "quantize", "inspect", "quantize"]
    assert [c[1] for c in commands("package")] == ["codecs", "quantize"]
    linked = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    assert "tutorial_codec.md" in linked


def test_the_line_has_one_place() -> None:
    text = Path(codecs_package.__file__).read_text(encoding="utf-8")
    lines = BY_TITLE["vqllm/codecs/__init__.py"].splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] != "+")
    after = "".join(line[1:] for line in lines)
    assert text.count(after if IN_TREE else before) == 1
    body = ast.parse(text.replace(before, after)).body
    names = [
        [name.name for name in node.names] for node in body if isinstance(node, ast.ImportFrom)
    ]
    assert NAME in names[0]
    assert names[0] == sorted(names[0])


def test_registered_with_its_options() -> None:
    assert NAME in CODECS
    assert recipes.fields_of(CODECS.get(NAME)).keys() == {"scale_factor", "index_bits"}
    with pytest.raises(vqllm.RecipeError, match=r"index_bits.*4 or 6.*\(it is 5\)"):
        recipes.load("hexagonal-3bit", ("codec.index_bits=5",))


@pytest.mark.parametrize(("check", "others"), checks())
@pytest.mark.parametrize("number", [0, 1])
def test_battery(check: Callable[..., None], others: tuple[Any, ...], number: int) -> None:
    check(f"{NAME}-{number}", *others)


def test_figures_against_theory(capsys: pytest.CaptureFixture[str]) -> None:
    exec(BY_TITLE["theory"], {})
    printed = capsys.readouterr().out
    (shown,) = [body for kind, _, body in BLOCKS if kind == "text"]
    numbers, expected = (
        [float(n) for n in re.findall(r"\d\.\d+", text)] for text in (printed, shown)
    )
    assert numbers == pytest.approx(expected, abs=2e-4)
    for point, found in zip(CODECS.get(NAME).points, (numbers[:4], numbers[4:])):
        moment, _, in_all, measured = found
        assert moment == pytest.approx(0.0801875, abs=1e-4)
        assert in_all == pytest.approx(point.mse, rel=0.003)
        assert measured == pytest.approx(point.mse, rel=0.01)


def test_nearest_is_that_of_brute_force() -> None:
    point = CODECS.get(NAME).points[1]
    codec = codec_bench.build(NAME, point)
    X_IJE = torch.randn(40, 50, 2, generator=torch.Generator().manual_seed(0))
    state = codec.fit(X_IJE, None, torch.Generator())
    gap_IJE = codec.decode(codec.encode(X_IJE, state), state) - X_IJE
    all_IJKE = X_IJE[:, :, None] - state["codebook"].float()
    torch.testing.assert_close(gap_IJE.norm(dim=-1), all_IJKE.norm(dim=-1).amin(2))
    assert len(state["codebook"].unique(dim=0)) == 64


def test_commands_and_loading(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    small = shlex.split("--set calibration.sequences=4 --set calibration.length=32 --no-eval")
    for _, *arguments in commands():
        arguments = [as_tiny(f" {a} ", folder)[1:-1] for a in arguments]
        more = small if arguments[0] == "quantize" else []
        result = CliRunner().invoke(cli.app, [*arguments, *more], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert result.stdout
    exec(BY_TITLE["load"], {})
    assert capsys.readouterr().out.startswith("The capital of France is")
    model = AutoModelForCausalLM.from_pretrained(folder / "demo-5bit")
    packed = [m for m in model.modules() if isinstance(m, vqllm.runtime.VQLinear)]
    assert {m.spec.format.format_id for m in packed} == {"residual-v1"}


def test_a_package_of_its_own(folder: Path) -> None:
    """Installed with pip and used by the command line; the result is loaded without it."""
    project = folder / "vqllm-hexagonal"
    project.mkdir()
    for title, name in (
        ("vqllm-hexagonal/pyproject.toml", "pyproject.toml"),
        ("vqllm/codecs/hexagonal.py", "vqllm_hexagonal.py"),
        ("recipes/codecs/hexagonal-3bit.yaml", "hexagonal-3bit.yaml"),
    ):
        text = BY_TITLE[title] + (SMALL if name.endswith(".yaml") else "")
        (project / name).write_text(text, encoding="utf-8")
    assert BY_TITLE["package"].startswith("pip install ./vqllm-hexagonal\n")
    target = pip_install(project, folder / "packages")
    printed, said = "", ""
    for _, *arguments in commands("package"):
        arguments = [as_tiny(f" {a} ", folder)[1:-1] for a in arguments]
        more = ["--no-eval"] if arguments[0] == "quantize" else []
        done = run_python("-m", "vqllm", *arguments, *more, path=(target,), cwd=folder)
        assert done.returncode == 0, done.stderr
        printed, said = printed + done.stdout, said + done.stderr
    assert f" {NAME} " in printed
    if IN_TREE:
        assert "codec 'hexagonal' is registered twice" in said
    else:
        assert "cannot be used" not in said
    model = AutoModelForCausalLM.from_pretrained(folder / "demo-package")
    packed = [m for m in model.modules() if isinstance(m, vqllm.runtime.VQLinear)]
    assert len(packed) == 7
    assert {m.spec.format.format_id for m in packed} == {"lut-v1"}
    assert torch.isfinite(model(torch.arange(3, 30)[None]).logits).all()
