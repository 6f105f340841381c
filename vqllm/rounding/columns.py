"""What rules that code one tile column after another have in common: padding, order, coding."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vqllm.tiles import from_tiles, to_tiles
from vqllm.types import Codec, State

PADDING = 1e-4
"""H of the features that fill up the last tile, relative to mean(diag H). They are coupled to
nothing; a small weight keeps a codec that weighs errors from caring about them."""


@dataclass
class TileColumns:
    """W and H padded to whole tile columns, in the order in which the columns are coded.

    Column k of the order is column `order[k]` of the grid of tiles.
    """

    W_RC: Tensor
    H_CC: Tensor
    codec: Codec
    state: State
    order: list[int]
    kept: dict[int, Tensor] = field(default_factory=dict)
    """Codes [I, 1, M] by column of the grid."""

    @classmethod
    def of(
        cls, W_RC: Tensor, H_CC: Tensor, codec: Codec, state: State, heavy_last: bool = False
    ) -> "TileColumns":
        """In the order of the grid, or sorted by the trace of their blocks of H, largest last."""
        tile_cols = codec.tile[1]
        num_cols = W_RC.shape[1]
        num_tiles = -(-num_cols // tile_cols)
        if num_tiles * tile_cols > num_cols:
            W_RC, H_CC = _pad(W_RC, H_CC, num_tiles * tile_cols - num_cols)
        order = torch.arange(num_tiles, device=H_CC.device)
        if heavy_last:
            trace = torch.diagonal(H_CC).unflatten(0, (-1, tile_cols)).sum(1)
            order = torch.argsort(trace, stable=True)
            within = torch.arange(tile_cols, device=H_CC.device)
            features = (order[:, None] * tile_cols + within).flatten()
            W_RC, H_CC = W_RC[:, features], H_CC[features][:, features]
        return cls(W_RC, H_CC, codec, state, order.tolist())

    def __len__(self) -> int:
        return len(self.order)

    @property
    def width(self) -> int:
        """Columns of W in a tile column."""
        return self.codec.tile[1]

    def code(self, X_RT: Tensor, k: int, D_TT: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes of what is to stand in tile column k of the order.

        Args:
            X_RT: target, [R, tile_cols].
            D_TT: error weight of the columns, for a codec that weighs errors.

        Returns:
            codes [I, 1, M] and the reproduction [R, tile_cols].
        """
        tile = tile_rows, tile_cols = self.codec.tile
        weight_EE = None
        if self.codec.weighted and tile_cols > 1:  # within one column all errors weigh the same
            weight_EE = torch.block_diag(*[D_TT] * tile_rows)
        col = self.order[k]
        codes_I1M = self.codec.encode(to_tiles(X_RT, tile), self.state, col, weight_EE)
        X_hat_I1E = self.codec.decode(codes_I1M, self.state, col)
        return codes_I1M, from_tiles(X_hat_I1E, tile, len(X_RT), tile_cols)

    def keep(self, codes_I1M: Tensor, k: int, rows_I: Tensor | None = None) -> None:
        """Take up codes of tile column k of the order; only where `rows_I` is true, if given."""
        col = self.order[k]
        if rows_I is not None:
            codes_I1M = torch.where(rows_I[:, None, None], codes_I1M, self.kept[col])
        self.kept[col] = codes_I1M

    @property
    def codes_IJM(self) -> Tensor:
        """All codes, in the order of the grid."""
        return torch.cat([self.kept[col] for col in range(len(self))], dim=1)


def _pad(W_RC: Tensor, H_CC: Tensor, extra: int) -> tuple[Tensor, Tensor]:
    W_RC = torch.nn.functional.pad(W_RC, (0, extra))
    padded_CC = torch.nn.functional.pad(H_CC, (0, extra, 0, extra))
    torch.diagonal(padded_CC)[-extra:] = PADDING * torch.diagonal(H_CC).mean()
    return W_RC, padded_CC
