"""Cutting a matrix into tiles and putting it together again."""

import pytest
import torch

from vqllm.core import tiles

TILES = [(1, 1), (1, 8), (4, 1), (2, 3), (16, 16)]
SHAPES = [(5, 37), (16, 24), (1, 8), (37, 43), (33, 1)]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_at_every_size(tile, shape):
    W_RC = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape) + 1
    X_IJE = tiles.to_tiles(W_RC, tile)
    assert X_IJE.shape == (*tiles.grid(*shape, tile), tile[0] * tile[1])
    assert torch.equal(tiles.from_tiles(X_IJE, tile, *shape), W_RC)
    assert X_IJE.sum() == W_RC.sum(), "padding is zeros"


def test_elements_are_row_major_inside_a_tile():
    W_RC = torch.arange(24).reshape(4, 6)
    X_IJE = tiles.to_tiles(W_RC, (2, 3))
    for i in range(2):
        for j in range(2):
            block = W_RC[2 * i : 2 * i + 2, 3 * j : 3 * j + 3]
            assert torch.equal(X_IJE[i, j], block.flatten())


def test_padded_sizes():
    assert tiles.grid(5, 37, (2, 8)) == (3, 5)
    assert tiles.padded(5, 37, (2, 8)) == (6, 40)
    assert tiles.padded(16, 24, (1, 8)) == (16, 24)
    padded = tiles.pad(torch.ones(5, 37), (2, 8))
    assert padded.shape == (6, 40)
    assert padded[5:].abs().sum() + padded[:, 37:].abs().sum() == 0
