"""The bits of format lut-v2: every tile is an entry of the codebook of its group, times a scale.

Tiles are (tile_rows, tile_cols), I rows and J columns of them. Groups cover `group_rows` rows and
`group_cols` columns of the matrix, the last ones what is left; there are G rows and H columns of
groups, one where the size is null. A group has K = 2^index_bits entries of E = tile_rows ·
tile_cols elements, row-major inside the tile. With index_bits bits to an index:

    codes              uint8 [I, packed_bytes(J, index_bits)], as in lut-v1
    codebook "float16"
      codebook         float16 [G, H, K, E]
    codebook "int8"
      codebook         int8 [G, H, K, E], and the entries are codebook · codebook_scale
      codebook_scale   bfloat16 [G, H]
    codebook "svd"     tiles of one weight only
      coefficients     int8 [G, H, rank], and the entries are Σ_r coefficients[r] · basis[r],
      basis            float32 [rank, K]    added in the order of r
    scale_cols not null
      scale_index      uint8 [I, packed_bytes(B, 4)], indices into scale_table for B = ceil(C /
                       scale_cols) blocks of scale_cols columns of W, packed as in `bitpack`
      scale_table      bfloat16 [B, 16]; the tile is its entry · scale_table[block, index]

Source: GPTVQ, arXiv 2402.15319 (there scales are integers times a step of their logarithm).
"""

import torch
from torch import Tensor

from vqllm_kernels.bitpack import unpack_bits

SCALE_BITS = 4


def entries(tensors: dict[str, Tensor]) -> Tensor:
    """All codebooks, float32 [G, H, K, E], of the tensors that hold them."""
    if "basis" in tensors:
        total = torch.zeros((), device=tensors["basis"].device)
        for r, vector_K in enumerate(tensors["basis"].float()):
            total = total + tensors["coefficients"][..., r : r + 1].float() * vector_K
        return total[..., None]
    codebook_GHKE = tensors["codebook"].float()
    if "codebook_scale" in tensors:
        codebook_GHKE = codebook_GHKE * tensors["codebook_scale"].float()[..., None, None]
    return codebook_GHKE


def look_up(entries_GHKE: Tensor, index_IJ: Tensor, group_I: Tensor, group_J: Tensor) -> Tensor:
    """The entry of each tile, [I, J, E], given the row and column of its group."""
    _, num_group_cols, num_entries, _ = entries_GHKE.shape
    group_IJ = group_I[:, None] * num_group_cols + group_J
    return torch.nn.functional.embedding(
        group_IJ * num_entries + index_IJ, entries_GHKE.flatten(0, 2)
    )


def scale_of_tiles(index_IB: Tensor, table_BQ: Tensor, block_J: Tensor) -> Tensor:
    """The scale of each tile, float32 [I, J, 1], given the block that it lies in."""
    block_B = torch.arange(len(table_BQ), device=table_BQ.device)
    scale_IB = table_BQ.float()[block_B, index_IB.long()]
    return scale_IB[:, block_J, None]


def decode(
    tensors: dict[str, Tensor],
    tile: tuple[int, int],
    index_bits: int,
    tile_cols_of_group: int | None,
    tile_cols_of_scale: int | None,
    group_I: Tensor,
    cols: int,
) -> Tensor:
    """Weights, float32 [I · tile_rows, cols], of some or all rows of tiles.

    Args:
        tensors: as above; those with an axis of I hold the rows of tiles that are asked for.
        tile_cols_of_group: columns of tiles of a group; None is all of them.
        tile_cols_of_scale: columns of tiles that share a scale; None is no scales.
        group_I: row of groups that each row of tiles belongs to.
    """
    tile_rows, tile_cols = tile
    num_tile_cols = -(-cols // tile_cols)
    column_J = torch.arange(num_tile_cols, device=group_I.device)
    index_IJ = unpack_bits(tensors["codes"], index_bits, num_tile_cols)
    group_J = column_J // (tile_cols_of_group or max(num_tile_cols, 1))
    X_IJE = look_up(entries(tensors), index_IJ, group_I, group_J)
    if tile_cols_of_scale is not None:
        table_BQ = tensors["scale_table"]
        index_IB = unpack_bits(tensors["scale_index"], SCALE_BITS, len(table_BQ))
        X_IJE = X_IJE * scale_of_tiles(index_IB, table_BQ, column_J // tile_cols_of_scale)
    X = X_IJE.unflatten(-1, (tile_rows, tile_cols)).transpose(1, 2)
    return X.reshape(X.shape[0] * tile_rows, num_tile_cols * tile_cols)[:, :cols]
