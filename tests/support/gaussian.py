"""Gaussian weights for the tests of codecs, the same for the same seed."""

from typing import Any

import torch
from torch import Tensor

from vqllm.core import tiles
from vqllm.core.protocols import State


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def fitted(codec: Any, W_RC: Tensor) -> tuple[Tensor, State, Tensor]:
    """The tiles of weights, what the codec learns of them, and their codes."""
    X_IJE = tiles.to_tiles(W_RC, codec.tile)
    state = codec.fit(X_IJE, None, generator())
    return X_IJE, state, codec.encode(X_IJE, state)
