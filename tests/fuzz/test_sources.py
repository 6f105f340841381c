"""Damaged models to quantize: refused, or quantized to something that runs."""

import random
import shutil
from pathlib import Path

import pytest
import torch

import vqllm
from tests.fuzz.damage import damage
from tests.fuzz.outcome import refused
from tests.support.architectures import save_tiny
from tests.support.params import slow_but
from tests.support.quantized import quantize, recipe, write_words

TYPES = ("llama", "mixtral", "gpt2", "gemma3_text")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("sources")
    return [save_tiny(model_type, root / model_type) for model_type in TYPES]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", slow_but(range(20), range(100)))
def test_source(seed: int, folders: list[Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders[seed % len(folders)], tmp_path / "copy"))
    damage(folder, random.Random(seed))
    text = write_words(tmp_path / "words.txt")
    few = recipe(calibration={"sequences": 2, "length": 16})
    message, _ = refused(lambda: quantize(folder, tmp_path / "out", recipe=few, calibration=text))
    if message is None:
        model = vqllm.load(tmp_path / "out")[0]
        model(torch.tensor([[3, 4, 5]]))
