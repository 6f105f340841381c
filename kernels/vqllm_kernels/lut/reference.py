"""The bits of format lut-v1: every tile of the matrix is an entry of one look-up table."""

import torch
from torch import Tensor

from vqllm_kernels.bitpack import unpack_bits


def decode(
    tensors: dict[str, Tensor], tile: tuple[int, int], index_bits: int, rows: int, cols: int
) -> Tensor:
    """Weights, float32 [rows, cols].

    Args:
        tensors: `codes` uint8 [I, packed_bytes(J, index_bits)], the indices of a row of tiles
            packed as in `bitpack`; `codebook` float16 [2^index_bits, tile_rows · tile_cols], the
            elements of a tile row-major.
        tile: (rows, cols) of a tile; I and J are the numbers of tiles, rounded up.
    """
    tile_rows, tile_cols = tile
    num_tile_cols = -(-cols // tile_cols)
    index_IJ = unpack_bits(tensors["codes"], index_bits, num_tile_cols)
    X_IJE = torch.nn.functional.embedding(index_IJ, tensors["codebook"].float())
    X = X_IJE.unflatten(-1, (tile_rows, tile_cols)).transpose(1, 2)
    return X.reshape(X.shape[0] * tile_rows, num_tile_cols * tile_cols)[:rows, :cols]
