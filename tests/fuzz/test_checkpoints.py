"""Damaged checkpoints: refused, read as the undamaged one, or changed where no checksum looks."""

import random
import shutil
from pathlib import Path

import pytest
import torch

import vqllm
from tests.fuzz.damage import damage
from tests.fuzz.outcome import refused
from tests.support.fake_checkpoint import FORMATS, fake_checkpoint
from tests.support.params import slow_but
from vqllm.checkpoint.dequantize import dequantize_checkpoint
from vqllm.checkpoint.inspect import inspect_checkpoint

TOKENS = torch.tensor([[5, 77, 300, 41]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A plain one, and one with embedding and head quantized."""
    made = []
    for small in (False, True):
        outside = FORMATS["uniform"] if small else None
        root = tmp_path_factory.mktemp("checkpoint")
        made.append(fake_checkpoint(root, outside=outside, tie_word_embeddings=small).folder)
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", slow_but(range(20), range(200)))
def test_checkpoint(seed: int, folders: list[Path], tmp_path: Path) -> None:
    rng = random.Random(seed)
    whole = folders[seed % 2]
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    changed = damage(folder, rng)
    refused(lambda: inspect_checkpoint(folder))
    refused(lambda: dequantize_checkpoint(folder, tmp_path / "dense"))
    message, loaded = refused(lambda: vqllm.load(folder, dtype=torch.float32))
    # Which classes and settings the model has, config.json says; a checksum has only the weights.
    if message is None and not changed & {"config.json"}:
        model = vqllm.load(whole, dtype=torch.float32)[0]
        assert torch.equal(model(TOKENS).logits, loaded[0](TOKENS).logits)
