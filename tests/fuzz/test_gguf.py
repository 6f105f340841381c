"""Damaged GGUF files: refused, or loaded to something that runs. The format has no checksums."""

import random
from pathlib import Path

import pytest
import torch

import vqllm
from tests.fuzz.damage import append, flip, truncate, zero
from tests.fuzz.outcome import refused
from tests.support.params import slow_but
from tests.unit.test_models import write_gguf

HEADER = 3000
"""Bytes at the beginning, where the keys and most of their lengths are."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQLLM_CACHE", str(tmp_path / "cache"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", slow_but(range(20), range(50)))
def test_gguf(seed: int, whole: bytes, tmp_path: Path) -> None:
    rng = random.Random(seed)
    file = tmp_path / "tiny.gguf"
    if rng.random() < 0.6:  # in the header
        head = tmp_path / "head"
        head.write_bytes(whole[:HEADER])
        rng.choice((flip, zero))(head, rng)
        file.write_bytes(head.read_bytes() + whole[HEADER:])
    else:
        file.write_bytes(whole)
        rng.choice((flip, zero, truncate, append))(file, rng)
    _, loaded = refused(lambda: vqllm.load(file))
    if loaded is not None:
        loaded[0](torch.tensor([[3, 4, 5]]))
