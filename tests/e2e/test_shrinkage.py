"""Runs with `hessian.shrinkage`: what they record, and what goes on with them."""

from pathlib import Path

import pytest

from tests.e2e.test_pipeline import KillAt, Killed, recipe, run, same_files
from tests.support.tiny import save_tiny
from vqllm.checkpoint.reader import Checkpoint
from vqllm.errors import CheckpointError
from vqllm.recipes import Recipe


def shrunken(shrinkage: float) -> Recipe:
    return recipe(hessian={"shrinkage": shrinkage})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "source")


def test_a_run_records_it_and_goes_on_with_the_same_only(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "whole", recipe=shrunken(0.8))
    config = Checkpoint.open(tmp_path / "whole").quantization
    assert config.extra["recipe"]["hessian"]["shrinkage"] == 0.8
    with pytest.raises(Killed):  # in the second layer
        run(source, tmp_path / "out", recipe=shrunken(0.8), progress=KillAt(14))
    for other, shown in ((recipe(), "(absent)"), (shrunken(0.9), "0.9")):
        with pytest.raises(CheckpointError) as caught:
            run(source, tmp_path / "out", recipe=other)
        assert f"recipe.hessian.shrinkage: 0.8 → {shown}" in str(caught.value)
    run(source, tmp_path / "out", recipe=shrunken(0.8))
    assert same_files(tmp_path / "whole", tmp_path / "out")


def test_without_it_bytes_and_records_are_those_of_no_key(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "without", recipe=recipe())
    run(source, tmp_path / "one", recipe=shrunken(1.0))
    assert same_files(tmp_path / "without", tmp_path / "one")
    recorded = Checkpoint.open(tmp_path / "one").quantization.extra["recipe"]
    assert "shrinkage" not in recorded["hessian"]
