"""The mean squared error of a codec on Gaussian weights."""

import torch

from vqllm.core import threads
from vqllm.core.protocols import Codec
from vqllm.core.tiles import to_tiles

ROWS, COLS = 512, 256
"""Size of the matrix of weights that is coded: 2^17 weights, whose own mean square is off by 0.4 %.
A codec with a learned codebook of many entries fits them better than a larger matrix."""
SEED = 1


def gaussian_mse(codec: Codec) -> float:
    """Mean squared error of a codec on weights of unit variance that are independent and Gaussian,
    relative to their mean square; each tile is coded as the nearest. Deterministic."""
    W_RC = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(SEED))
    X_IJE = to_tiles(W_RC, codec.tile)
    state = codec.fit(X_IJE, None, torch.Generator().manual_seed(SEED + 1))
    X_hat_IJE = codec.decode(codec.encode(X_IJE, state), state)
    error, energy = (threads.total(X.double().square()) for X in (X_hat_IJE - X_IJE, X_IJE))
    return float(error / energy)
