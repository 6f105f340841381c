"""Padding, order and coding of tile columns, for the rules that code one after another."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from vqllm.core import linalg
from vqllm.core.protocols import Codec, OutlierCodec, State
from vqllm.core.tiles import from_tiles, to_tiles

Order = Literal["natural", "hessian", "energy"]

PADDING = 1e-4
"""H of the features that fill up the last tile, relative to mean(diag H). They are coupled to
nothing; a small weight keeps a codec that weighs errors from caring about them."""


@dataclass
class TileColumns:
    """W and H padded to whole tile columns, in the order in which the columns are coded.

    Column k of the order is column `order[k]` of the grid of tiles. Where the codec that was given
    stores outliers apart, `codec` and `state` are those of its base, and W is without the outliers.
    """

    W_RC: Tensor
    H_CC: Tensor
    codec: Codec
    state: State
    order: list[int]
    outer: OutlierCodec | None = None
    """the codec that was given, if it stores outliers apart"""
    outliers_RC: Tensor | None = None
    """the outliers that it stores, in the order of the columns"""
    codes: dict[int, Tensor] = field(default_factory=dict)
    """Codes [I, 1, M] by column of the grid, of the columns that are coded."""

    @classmethod
    def of(
        cls, W_RC: Tensor, H_CC: Tensor, codec: Codec, state: State, order: Order = "natural"
    ) -> "TileColumns":
        """Columns in the order of the grid, or with the largest `size` of the order last."""
        tile_cols = codec.tile[1]
        num_cols = W_RC.shape[1]
        num_tiles = -(-num_cols // tile_cols)
        if num_tiles * tile_cols > num_cols:
            W_RC, H_CC = _pad(W_RC, H_CC, num_tiles * tile_cols - num_cols)
        # Rules go from the last column to the first: the largest come last, to be coded first,
        # while all other columns can still compensate for their errors.
        order_K = torch.arange(num_tiles, device=H_CC.device)
        if order != "natural":
            order_K = torch.argsort(_size(W_RC, H_CC, tile_cols, order), stable=True)
            features = _features(order_K, tile_cols)
            W_RC, H_CC = W_RC[:, features], H_CC[features][:, features]
        columns = cls(W_RC, H_CC, codec, state, order_K.tolist())
        # The rules code W without its outliers, with the codec of the base.
        if isinstance(codec, OutlierCodec):
            S_RC = from_tiles(codec.outliers(state, num_tiles), codec.tile, *W_RC.shape)
            columns.outer, columns.outliers_RC = codec, S_RC[:, columns._features()]
            columns.codec, columns.state = codec.base, codec.base_state(state)
            columns.W_RC = W_RC - columns.outliers_RC
        return columns

    def replace_outliers(self, S_RC: Tensor) -> None:
        """Store other outliers, in the order of the columns, and subtract them from W instead."""
        assert self.outliers_RC is not None
        self.W_RC = self.W_RC + self.outliers_RC - S_RC
        self.outliers_RC = S_RC

    def in_grid_order(self, A_RC: Tensor) -> Tensor:
        """A matrix in the order of the columns, as the grid of tiles has them."""
        ordered_RC = torch.empty_like(A_RC)
        ordered_RC[:, self._features()] = A_RC
        return ordered_RC

    @property
    def result(self) -> tuple[Tensor, State]:
        """All codes, in the order of the grid, and the state of the codec that was given."""
        if self.outer is None or self.outliers_RC is None:
            return self.codes_IJM, self.state
        S_IJE = to_tiles(self.in_grid_order(self.outliers_RC), self.codec.tile)
        return self.codes_IJM, self.outer.with_outliers(S_IJE, self.state)

    def _features(self) -> Tensor:
        """The columns of W in their order."""
        order_K = torch.tensor(self.order, device=self.H_CC.device)
        return _features(order_K, self.width)

    def __len__(self) -> int:
        return len(self.order)

    @property
    def width(self) -> int:
        """Columns of W in a tile column."""
        return self.codec.tile[1]

    def code(self, X_RT: Tensor, k: int, D_TT: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes of a target for tile column k of the order.

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

    def groups(self) -> Iterator[range]:
        """Ranges of tile columns for which the codec fits its state anew, from last to first.

        All columns are one range for a codec that does not.
        """
        refit_cols = self.codec.refit_cols
        per_group = len(self) if refit_cols is None else refit_cols // self.width
        for start in reversed(range(0, len(self), per_group)):
            yield range(start, min(start + per_group, len(self)))

    def refit(self, X_RG: Tensor, group: range, D_KTT: Tensor) -> None:
        """Let the codec fit its state to the columns of a group, if it does.

        Args:
            X_RG: targets of the group's columns of W, with the feedback of the coded columns.
            D_KTT: error weights of all tile columns. Their diagonals weigh the fit, because `code`
                minimises the error in the norm of D, not in that of H.
        """
        if self.codec.refit_cols is None:
            return
        tile_rows = self.codec.tile[0]
        weight_KT = torch.diagonal(D_KTT[group.start : group.stop], dim1=1, dim2=2)
        weight_1KE = weight_KT[None].repeat(1, 1, tile_rows)
        X_IKE = to_tiles(X_RG, self.codec.tile)
        self.state = self.codec.refit(X_IKE, weight_1KE, self.state, group.start)

    def keep_all(self, codes_IJM: Tensor) -> Tensor:
        """Store codes of the whole grid; returns W − Ŵ, [R, C], in the order of the columns."""
        E_RC = self.W_RC.clone()
        for k, col in enumerate(self.order):
            codes_I1M = codes_IJM[:, col : col + 1]
            self.codes[col] = codes_I1M
            X_hat_I1E = self.codec.decode(codes_I1M, self.state, col)
            own = slice(k * self.width, (k + 1) * self.width)
            E_RC[:, own] -= from_tiles(X_hat_I1E, self.codec.tile, len(E_RC), self.width)
        return E_RC

    def keep(self, codes_I1M: Tensor, k: int, rows_I: Tensor | None = None) -> None:
        """Store codes of tile column k of the order; only where `rows_I` is true, if given."""
        col = self.order[k]
        if rows_I is not None:
            codes_I1M = torch.where(rows_I[:, None, None], codes_I1M, self.codes[col])
        self.codes[col] = codes_I1M

    @property
    def codes_IJM(self) -> Tensor:
        """All codes, in the order of the grid."""
        return torch.cat([self.codes[col] for col in range(len(self))], dim=1)


def _features(order_K: Tensor, tile_cols: int) -> Tensor:
    """Columns of W in an order of tile columns."""
    within = torch.arange(tile_cols, device=order_K.device)
    return (order_K[:, None] * tile_cols + within).flatten()


def _size(W_RC: Tensor, H_CC: Tensor, tile_cols: int, order: Order) -> Tensor:
    """The sort key of tile columns: tr H_kk (hessian) or tr W_k H_kk W_kᵀ (energy), [K]."""
    H_KTT = linalg.diagonal_blocks(H_CC, tile_cols)
    if order == "hessian":
        return torch.diagonal(H_KTT, dim1=1, dim2=2).sum(1)
    W_KRT = W_RC.unflatten(1, (-1, tile_cols)).transpose(0, 1)
    return ((W_KRT @ H_KTT) * W_KRT).sum((1, 2))


def _pad(W_RC: Tensor, H_CC: Tensor, extra: int) -> tuple[Tensor, Tensor]:
    W_RC = torch.nn.functional.pad(W_RC, (0, extra))
    padded_CC = torch.nn.functional.pad(H_CC, (0, extra, 0, extra))
    torch.diagonal(padded_CC)[-extra:] = PADDING * torch.diagonal(H_CC).mean()
    return W_RC, padded_CC
