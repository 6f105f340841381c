"""Runs that aim at a size, a KL divergence, or a number of bits between the listed ones."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import save_tiny
from vqllm import api
from vqllm.errors import RecipeError
from vqllm.forecast import quality
from vqllm.plan.costs import code_bits
from vqllm.runs.targets import bytes_of


@pytest.fixture(autouse=True)
def known_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of codecs that take no time."""
    monkeypatch.setattr(quality, "gaussian_mse", lambda codec: 1.2 * 4.0 ** -code_bits(codec))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    folder = tmp_path_factory.mktemp("model") / "source"
    return save_tiny(folder, "qwen2", tie_word_embeddings=False, **sizes)


def options(text: Path) -> dict[str, Any]:
    few = ("calibration.sequences=16", "calibration.length=64")
    return {"calibration": text, "changes": few, "device": "cpu"}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_a_size_is_planned_with_embedding_and_head(model: Path, text: Path) -> None:
    planned = api.plan(model, size="0.25MB", **options(text))
    assert 0.985 * 250_000 <= planned.file_bytes <= 250_000
    assert planned.recipe_values["head"] is not None


@pytest.mark.slow
def test_files_have_the_size_that_was_asked_for_or_hardly_less(
    tmp_path: Path, model: Path, text: Path
) -> None:
    api.quantize(model, tmp_path / "out", size="0.25MB", evaluate=False, **options(text))
    assert 0.985 * 250_000 <= size_of(tmp_path / "out") <= 250_000


def test_sizes_are_read_with_their_units() -> None:
    texts = (60, "60", "60MB", "1.5 GB", "57MiB", "3k")
    assert [*map(bytes_of, texts)] == [60, 60, 60e6, 1.5e9, 57 * 2**20, 3000]


def test_sizes_out_of_reach_are_refused_with_those_that_are_not(model: Path, text: Path) -> None:
    with pytest.raises(RecipeError, match=r"--size 0\.05 MB: .* takes at least 0\.\d+ MB"):
        api.plan(model, size="50kB", **options(text))
    with pytest.raises(RecipeError, match=r"--size 3\.00 MB: .* below that have 0\.\d+ MB"):
        api.plan(model, size="3MB", **options(text))


@pytest.mark.parametrize("bits", [1.1, 2.3, 4.7, 5])
def test_any_number_of_bits_has_a_recipe(model: Path, bits: float) -> None:
    planned = api.plan(model, bits=bits, measure=False)
    assert planned.recipe == f"spread-{bits:g}bit"
    assert planned.recipe_values["allocation"]["bits"] == bits


@pytest.mark.slow
def test_a_divergence_is_aimed_at_and_the_expectation_is_corrected_once(
    tmp_path: Path, model: Path, text: Path
) -> None:
    planned = api.plan(model, bits=3, **options(text))
    assert planned.kl is not None
    target = planned.kl.value
    summary = api.quantize(model, tmp_path / "out", kl=target, **options(text))
    assert summary.evaluation is not None
    assert summary.evaluation["kl"] == pytest.approx(target, rel=0.5)  # a model of random weights


def test_a_divergence_out_of_reach_is_refused(model: Path, text: Path) -> None:
    with pytest.raises(RecipeError, match=r"--kl 50: .* is expected to have .* at 5 bits"):
        api.plan(model, kl=50, **options(text))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipe": "small", "size": "1MB"}, "give a recipe, or a number of bits"),
        ({"size": "1MB", "kl": 0.1}, "size and kl exclude each other"),
        ({"bits": 2, "kl": 0.1}, "bits and kl exclude each other"),
        ({"kl": 0.1, "preset": "fast"}, "kl with the preset fast"),
        ({"bits": 2.3, "preset": "fast"}, "codes all linears alike"),
        ({"bits": 5.1}, "from 1.1 to 5"),
        ({"size": "much"}, "expected bytes such as 60MB"),
        ({"kl": -1.0}, "above 0"),
    ],
)
def test_what_excludes_each_other_is_one_message(
    model: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        api.plan(model, **given)
