"""Rounding on both sides with many tiles at a time, along anti-diagonals of the matrix.

A block of rows needs the errors of the rows below it, a column those of the columns right of it. So
a block can begin when the one below it is one stripe ahead, and all tiles on an anti-diagonal are
coded together: 6 to 10 of a matrix of 576 to 1536 rows and columns, where block after block would
code one.

          stripe   0   1   2   3            the number is the step in which it is coded;
                 ┌───┬───┬───┬───┐          stripes 3 to 0 are one step each for a block
      block 0    │ 5 │ 4 │ 3 │ 2 │
      block 1    │ 4 │ 3 │ 2 │ 1 │
      block 2    │ 3 │ 2 │ 1 │ 0 │
                 └───┴───┴───┴───┘

Source of the order: Tseng et al., "YAQA", arXiv 2505.22988, section 3.1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vqllm.core import threads
from vqllm.core.tiles import from_tiles, to_tiles
from vqllm.rounding.columns import TileColumns

STRIPE = 32
"""Columns between two products with all that is coded. With fewer, more blocks are under way at a
time, and the products are smaller."""


@dataclass
class _Block:
    """A block of rows, and a stripe of it that is being coded."""

    rows: slice
    stripe: slice
    """columns of W"""
    pull_RS: Tensor
    """what the errors of the rows below add to the target"""


def code_along_diagonals(columns: TileColumns, L_CC: Tensor, L_RR: Tensor, rows: int) -> Tensor:
    """Codes int32 [I, J, M] of all tiles, in the order of the grid.

    Args:
        columns: with a codec that codes all tiles alike and takes no weights.
        L_CC: of H, in tile columns, in the order of the columns.
        L_RR: of the outputs' H, in blocks of `rows`.
        rows: of a block, whole tiles.
    """
    W_RC, width = columns.W_RC, columns.width
    tile_rows, num_tiles = columns.codec.tile[0], max(STRIPE // columns.width, 1)
    # Errors W − Ŵ, and A − Ŵ against the target with the pull, which feedback along the row needs.
    E_RC, F_RC = torch.zeros_like(W_RC), torch.zeros_like(W_RC)
    starts = list(reversed(range(0, len(W_RC), rows)))
    ends = list(range(len(columns), 0, -num_tiles))
    codes_IJM = None
    for step in range(len(starts) + len(ends) - 1):
        blocks = []
        for n, start in enumerate(starts):
            if not 0 <= step - n < len(ends):
                continue
            end = ends[step - n]
            own = slice(start, min(start + rows, len(W_RC)))
            stripe = slice(max(end - num_tiles, 0) * width, end * width)
            # A_b = W_b + (L_Oᵀ E)_b over the rows below, which are coded already.
            below = slice(start + rows, len(W_RC))
            pull_RS = _product(L_RR[below, own].T, E_RC[below, stripe])
            blocks.append(_Block(own, stripe, pull_RS))
        found = _code_stripes(columns, L_CC, F_RC, blocks, rows)
        for block, (codes_ISM, F_RS) in zip(blocks, found):
            F_RC[block.rows, block.stripe] = F_RS
            E_RC[block.rows, block.stripe] = F_RS - block.pull_RS
            if codes_IJM is None:
                shape = (-(-len(W_RC) // tile_rows), len(columns), codes_ISM.shape[2])
                codes_IJM = codes_ISM.new_empty(shape)
            first = block.rows.start // tile_rows
            order = columns.order[block.stripe.start // width : block.stripe.stop // width]
            codes_IJM[first : first + len(codes_ISM), order] = codes_ISM
    assert codes_IJM is not None, "W has rows and columns"
    return codes_IJM


@threads.one_thread()
def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b. Where the result is as small as here, threads would share the sums."""
    return a @ b


def _code_stripes(
    columns: TileColumns, L_CC: Tensor, F_RC: Tensor, blocks: list[_Block], rows: int
) -> list[tuple[Tensor, Tensor]]:
    """Codes [I, tile columns, M] of the stripe of each block, and its errors A − Ŵ."""
    codec, state, width = columns.codec, columns.state, columns.width
    size = max(block.stripe.stop - block.stripe.start for block in blocks)
    # Targets of all blocks, filled up with zeros above and left of what is there.
    A_NRS = F_RC.new_zeros(len(blocks), rows, size)
    X_NRS, F_NRS = torch.zeros_like(A_NRS), torch.zeros_like(A_NRS)
    L_NSS = F_RC.new_zeros(len(blocks), size, size)
    is_row_NR1 = torch.zeros(len(blocks), rows, 1, dtype=torch.bool, device=F_RC.device)
    for n, block in enumerate(blocks):
        own, stripe = block.rows, block.stripe
        num_rows, left = own.stop - own.start, size - (stripe.stop - stripe.start)
        A_RS = columns.W_RC[own, stripe] + block.pull_RS
        known = slice(stripe.stop, None)
        A_NRS[n, :num_rows, left:] = A_RS
        X_NRS[n, :num_rows, left:] = A_RS + _product(F_RC[own, known], L_CC[known, stripe])
        L_NSS[n, left:, left:] = L_CC[stripe, stripe]
        is_row_NR1[n, :num_rows] = True
    codes = []
    for start in reversed(range(0, size, width)):
        own, done = slice(start, start + width), slice(start + width, size)
        X_NRT = X_NRS[:, :, own] + _product(F_NRS[:, :, done], L_NSS[:, done, own])
        X_I1E = to_tiles(X_NRT.flatten(0, 1), codec.tile)
        codes_I1M = codec.encode(X_I1E, state)
        W_hat = from_tiles(codec.decode(codes_I1M, state), codec.tile, len(blocks) * rows, width)
        F_NRT = A_NRS[:, :, own] - W_hat.unflatten(0, (-1, rows))
        F_NRS[:, :, own] = F_NRT.masked_fill_(~is_row_NR1, 0)
        codes.insert(0, codes_I1M)
    codes_NIJM = torch.cat(codes, 1).unflatten(0, (len(blocks), -1))
    found = []
    for block, codes_IJM, F_RS in zip(blocks, codes_NIJM, F_NRS):
        num_rows, num_cols = block.pull_RS.shape
        num_tiles = -(-num_rows // codec.tile[0])
        found.append(
            (codes_IJM[:num_tiles, -(num_cols // width) :], F_RS[:num_rows, size - num_cols :])
        )
    return found
