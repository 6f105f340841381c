"""What somebody publishes says nothing of the machine that it was made on."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vqllm
from tests.support.tiny import TEXT, save_tiny
from vqllm.cli import app

MARK = "jane-doe"
SMALL = ("calibration.sequences=4", "calibration.length=32")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a user, with a model whose files name places, and things beside it."""
    home = tmp_path_factory.mktemp("root") / MARK / "work"
    source = save_tiny(home / "models" / "tiny", "qwen2")
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((source / name).read_text())
        key = "_name_or_path" if name == "config.json" else "name_or_path"
        (source / name).write_text(json.dumps(values | {key: str(source)}))
    for name in ("notes.txt", "id_rsa", "secrets.env", "train.log", "trainer_state.json"):
        (source / name).write_text(MARK)
    (home / "texts").mkdir()
    (home / "texts" / "cal.txt").write_text(TEXT * 60)
    return home


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQLLM_CACHE", str(tmp_path / "cache"))


def options(home: Path, *more: str) -> list[str]:
    own = ["--calibration", str(home / "texts" / "cal.txt"), "--no-eval"]
    return own + [word for change in (*SMALL, *more) for word in ("--set", change)]


def invoke(*words: str | Path) -> None:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output


def check(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        assert MARK.encode() not in path.read_bytes(), path
        assert path.name not in ("notes.txt", "id_rsa", "secrets.env", "train.log")
    assert (folder / "tokenizer.json").is_file()


def test_a_checkpoint_tells_no_paths_and_is_tuned_without_being_told_the_original(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = home / "out"
    invoke(
        *["quantize", "--recipe", "rtn-4bit", "--output"], out, home / "models/tiny", *options(home)
    )
    check(out)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["source"] == {"model": "tiny"}
    assert config["recipe"]["calibration"]["source"] == ["cal.txt"]
    assert "cal.txt" in (out / "README.md").read_text()
    monkeypatch.chdir(tmp_path)  # where no folder is called tiny
    invoke("tune", out, "--output", home / "tuned", *options(home, "stages.0.steps=2"))
    check(home / "tuned")
    invoke("dequantize", out, "--output", home / "dense")
    check(home / "dense")
    # On a machine that did not make it, the original must be named.
    monkeypatch.setenv("VQLLM_CACHE", str(tmp_path / "another"))
    with pytest.raises(vqllm.errors.ModelError, match=r"made from 'tiny', .*--teacher"):
        vqllm.tune(out, tmp_path / "x", calibration=str(home / "texts/cal.txt"))


def test_nor_does_one_of_python_or_of_a_recipe_that_tunes(home: Path) -> None:
    vqllm.quantize(
        home / "models" / "tiny",
        home / "tuned-2bit",
        recipe="tuned-2bit",
        calibration=home / "texts" / "cal.txt",
        changes=(
            *SMALL,
            "layer=null",
            "tune.stages.0.steps=2",
            "tune.calibration.sequences=4",
            "tune.calibration.length=32",
            "allocation.bits=3",
        ),
        evaluate=False,
    )
    check(home / "tuned-2bit")


def test_nor_does_a_comparison(home: Path) -> None:
    out = home / "compared"
    recipes = ("--recipe", "rtn-4bit", "--recipe", "kmeans-2bit")
    invoke("compare", home / "models/tiny", "--output", out, *recipes, *options(home)[:2],
           *options(home)[3:])  # fmt: skip
    for name in ("rtn-4bit", "kmeans-2bit"):
        check(out / name)
    for page in ("comparison.md", "comparison.json"):
        assert MARK not in (out / page).read_text()
