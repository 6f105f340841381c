"""From a matrix to its grid of tiles and back."""

import torch
from torch import Tensor


def grid(rows: int, cols: int, tile: tuple[int, int]) -> tuple[int, int]:
    """Rows I and columns J of the grid of tiles that covers a matrix."""
    tile_rows, tile_cols = tile
    return -(-rows // tile_rows), -(-cols // tile_cols)


def padded(rows: int, cols: int, tile: tuple[int, int]) -> tuple[int, int]:
    """Size of a matrix after padding to whole tiles."""
    num_tile_rows, num_tile_cols = grid(rows, cols, tile)
    return num_tile_rows * tile[0], num_tile_cols * tile[1]


def pad(W_RC: Tensor, tile: tuple[int, int]) -> Tensor:
    """W with zeros below and to the right, up to whole tiles."""
    rows, cols = W_RC.shape
    padded_rows, padded_cols = padded(rows, cols, tile)
    return torch.nn.functional.pad(W_RC, (0, padded_cols - cols, 0, padded_rows - rows))


def to_tiles(W_RC: Tensor, tile: tuple[int, int]) -> Tensor:
    """The tiles of a matrix, zero-padded to whole tiles.

    Args:
        W_RC: any matrix.
        tile: (rows, cols) of a tile.

    Returns:
        X_IJE of the same dtype, the elements of a tile row-major along E.
    """
    tile_rows, tile_cols = tile
    W_RC = pad(W_RC, tile)
    X_IrJc = W_RC.unflatten(1, (-1, tile_cols)).unflatten(0, (-1, tile_rows))
    return X_IrJc.transpose(1, 2).flatten(2)


def from_tiles(X_IJE: Tensor, tile: tuple[int, int], rows: int, cols: int) -> Tensor:
    """Inverse of `to_tiles`: the matrix of `rows` x `cols`, padding cropped."""
    X_IJrc = X_IJE.unflatten(2, tile)
    return X_IJrc.transpose(1, 2).flatten(2).flatten(0, 1)[:rows, :cols]
