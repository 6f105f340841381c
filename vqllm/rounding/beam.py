"""Beam search: several codings of each row go on until it is clear which is the best.

Rows of tiles do not affect each other's loss: each has a search of its own, all at the same time.
Tile columns are visited from last to first, several times:

    first      all columns to the right are coded, none to the left. With H = L D Lᵀ the loss so far
               is Σ_k (X_k − Ŵ_k) D_k (X_k − Ŵ_k)ᵀ, X the targets of LDLQ, which takes the code of
               least loss in every column. Here the best `beam` partial codings go on, each with
               several codes.
    passes     all other columns are coded. A new code of column k changes the loss by the
               difference of (X_k − Ŵ_k) H_kk (X_k − Ŵ_k)ᵀ, X the targets of coordinate descent.
               Again the best `pass_beam` codings go on. The old code of a column is among its new
               ones, so no pass raises the loss.

Both need the exact loss only, whatever the codec; the codec lists good codes of a target. With
beams of 1 the rule is LDLQ and coordinate descent.

         stripe                          Codings differ inside a stripe; at its end the best one
    ┌───┬─────────────────┬─────────┐    stays. Rows kept B-fold as a whole gain another 0 to 10 %
    │ W │◄── B codings ───│ 1 coding│    of what the beam gains, for B times the memory and B
    └───┴─────────────────┴─────────┘    products with H in place of one.

Proxy loss and seconds of one core's time for 10^6 weights: 384 rows of two linears of the demo
model, additive codec (2 x 256 entries for 8 weights) as they are, e8p after Hadamard transforms:

                                   additive                     e8p
                                   q_proj          down_proj    q_proj          down_proj
    ldlq                           0.00689   1.0   0.1167       0.00903   0.8   0.0345
    ldlq, 4 passes                 0.00641   4.8   0.0983       0.00879   4.3   0.0329
    beam 4                         0.00669   4.3   0.1140       0.00860   4.0   0.0334
    beam 4, 2 passes               0.00639   6.3   0.1000       0.00847   5.4   0.0324
    beam 4, 4 passes               0.00633   8.4   0.0973       0.00847   6.9   0.0322
    beam 4, 4 passes of beam 4     0.00625  22.6   0.0959       0.00841  22.4   0.0320

The beam pays in the first visit; a pass with a beam of 4 takes as long as four without.

Source: AQLM, arXiv 2401.06118, section 3.2 (beam search over rows with the exact loss, there one
codebook after another and from given codes). The first visit is K-best decoding with a Cholesky
factor: Guo and Nilsson, IEEE J. Sel. Areas Commun. 24 (2006), 491-503.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from vqllm.core import linalg
from vqllm.core.protocols import Codec, OutlierCodec, Rounding, State
from vqllm.errors import RecipeError
from vqllm.rounding import coordinate
from vqllm.rounding.base import ROUNDINGS
from vqllm.rounding.columns import TileColumns

STRIPE = 256
"""Columns of W between two products with all of them, where all codings but the best end."""
_CODES = 4
"""Codes that a coding goes on with, at most."""


@ROUNDINGS.register("beam")
class Beam(Rounding):
    """LDLQ and coordinate descent with several codings of each row; for codecs that list codes."""

    type: Literal["beam"] = "beam"
    beam: int = Field(
        default=4,
        ge=1,
        le=64,
        description="codings of a row of tiles that go on in the first visit",
    )
    passes: int = Field(
        default=2, ge=0, description="passes over all tile columns after the first visit"
    )
    pass_beam: int = Field(
        default=1, ge=1, le=64, description="codings of a row of tiles that go on in a pass"
    )
    order: Literal["natural", "hessian"] = Field(
        default="natural",
        description="natural: from the last column to the first; hessian: tile columns with the "
        "largest diagonal of H first",
    )

    def __call__(
        self, W_RC: Tensor, H_CC: Tensor, codec: Codec, state: State
    ) -> tuple[Tensor, State]:
        columns = self._columns(W_RC, H_CC, codec, state)
        E_RC = feedback(columns, self.beam, STRIPE)
        self._improve(columns, E_RC, self.passes)
        return columns.result

    def refine(
        self, W_RC: Tensor, H_CC: Tensor, codec: Codec, codes_IJM: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """The passes alone, at least one, which do not raise the loss of `codes_IJM`."""
        columns = self._columns(W_RC, H_CC, codec, state)
        E_RC = columns.keep_all(codes_IJM)
        self._improve(columns, E_RC, max(self.passes, 1))
        return columns.result

    def _improve(self, columns: TileColumns, E_RC: Tensor, passes: int) -> None:
        for _ in range(passes):
            if self.pass_beam == 1:
                coordinate.descend(columns, E_RC, STRIPE)
            else:
                descend(columns, E_RC, self.pass_beam, STRIPE)

    def _columns(self, W_RC: Tensor, H_CC: Tensor, codec: Codec, state: State) -> TileColumns:
        return TileColumns.of(W_RC, H_CC, codec, state, self.order)

    def check(self, codec: Codec) -> None:
        base = codec.base if isinstance(codec, OutlierCodec) else codec
        if not base.lists_codes:
            raise RecipeError(
                f"rounding beam: codec {base.type} finds one code for a target, and the search "
                "needs several. Use additive, kmeans, e8p, d4, or another codec that lists codes, "
                "or a residual of these; or rounding ldlq"
            )


@dataclass(frozen=True)
class _Measure:
    """The cost of an error E = W − Ŵ in one tile column, and its effect on the other targets.

    The target of column k is W_k − E_k + (E A)_k inverse_k, with E_k = 0 while the column is not
    coded. A gap between code and target costs its square in the norm of `norm_k`.
    """

    A_CC: Tensor
    norm_KTT: Tensor
    inverse_KTT: Tensor | None
    """None on the first visit: the identity, and there are no old codes."""


def feedback(columns: TileColumns, beam: int, stripe: int) -> Tensor:
    """Code all tile columns from last to first; returns W − Ŵ, [R, C].

    Args:
        columns: stores the codes.
        beam: codings of each row of tiles that go on.
        stripe: columns of W between two products with the whole of L.
    """
    width = columns.width
    L_CC, D_KTT = linalg.block_ldl(columns.H_CC, width)
    measure = _Measure(L_CC, D_KTT, None)
    E_RC = torch.zeros_like(columns.W_RC)
    for tiles in _stripes(len(columns), max(stripe // width, 1)):
        start, end = tiles.start * width, tiles.stop * width
        pull_RS = E_RC[:, end:] @ L_CC[end:, start:end]
        _search(columns, E_RC, pull_RS, tiles, beam, measure)
    return E_RC


def descend(columns: TileColumns, E_RC: Tensor, beam: int, stripe: int) -> None:
    """One pass over all tile columns, from last to first, that does not raise the loss.

    Args:
        columns: all coded; stores the new codes.
        E_RC: W − Ŵ, updated in place.
        beam: codings of each row of tiles that go on.
        stripe: columns of W between two products with the whole of H.
    """
    H_CC, width = columns.H_CC, columns.width
    H_KTT = linalg.diagonal_blocks(H_CC, width)
    measure = _Measure(H_CC, H_KTT, torch.cholesky_inverse(torch.linalg.cholesky(H_KTT)))
    for tiles in _stripes(len(columns), max(stripe // width, 1)):
        pull_RS = E_RC @ H_CC[:, tiles.start * width : tiles.stop * width]
        _search(columns, E_RC, pull_RS, tiles, beam, measure)


def _stripes(num_tiles: int, tiles_per_stripe: int) -> Iterator[range]:
    """The tile columns of each stripe, from the last."""
    for stop in range(num_tiles, 0, -tiles_per_stripe):
        yield range(max(stop - tiles_per_stripe, 0), stop)


@dataclass(frozen=True)
class _Codings:
    """B ways to code the visited part of a stripe, for each row of tiles.

    r are the rows of a tile, S the columns of the stripe, V its visited tile columns, latest last.
    """

    loss_IB: Tensor
    """relative to that before the stripe"""
    E_IBrS: Tensor
    """W − Ŵ"""
    pull_IBrS: Tensor
    """(W − Ŵ) A, no longer right of the visited columns"""
    codes: tuple[Tensor, ...]
    """[I, B, M] for each of V"""

    def chosen(self, index_IB: Tensor) -> "_Codings":
        """Some of the codings of each row, by index."""
        return _Codings(
            _taken(self.loss_IB, index_IB),
            _taken(self.E_IBrS, index_IB),
            _taken(self.pull_IBrS, index_IB),
            tuple(_taken(codes_IBM, index_IB) for codes_IBM in self.codes),
        )


def _search(
    columns: TileColumns, E_RC: Tensor, pull_RS: Tensor, tiles: range, beam: int, measure: _Measure
) -> None:
    """Code a stripe of tile columns, or code it again.

    Args:
        columns: stores the codes.
        E_RC: W − Ŵ, updated in place.
        pull_RS: E A in the stripe.
        tiles: the stripe's tile columns.
    """
    width, tile_rows = columns.width, columns.codec.tile[0]
    stripe = slice(tiles.start * width, tiles.stop * width)
    # Every row of tiles starts the stripe with one coding, B = 1, and its loss counts from zero.
    E_IrS = _by_tile_row(E_RC[:, stripe], tile_rows)
    loss_IB = E_IrS.new_zeros(len(E_IrS), 1)
    pull_IrS = _by_tile_row(pull_RS, tile_rows)
    codings = _Codings(loss_IB, E_IrS[:, None], pull_IrS[:, None], ())
    for k in reversed(tiles):
        codings = _visit(columns, codings, k, tiles, beam, measure)
    # At the end of the stripe the best coding of each row of tiles becomes the result.
    best = codings.chosen(codings.loss_IB.argmin(1, keepdim=True))
    E_RC[:, stripe] = best.E_IBrS.flatten(0, 2)[: len(E_RC)]
    for k, codes_I1M in zip(reversed(tiles), best.codes):
        columns.keep(codes_I1M, k)


def _visit(
    columns: TileColumns, codings: _Codings, k: int, tiles: range, beam: int, measure: _Measure
) -> _Codings:
    """The best codings after tile column k of the order."""
    width, tile_rows = columns.width, columns.codec.tile[0]
    start = tiles.start * width
    own = slice(k * width, (k + 1) * width)
    here = slice(own.start - start, own.stop - start)
    norm_TT = measure.norm_KTT[k]
    W_I1rT = _by_tile_row(columns.W_RC[:, own], tile_rows)[:, None]
    old_E_I1rT = codings.E_IBrS[:, :1, :, here]  # not visited: the same in all codings
    # The target of each coding: X_k = W_k − E_k + (E A)_k inverse_k.
    pull_IBrT = codings.pull_IBrS[..., here]
    if measure.inverse_KTT is not None:
        pull_IBrT = pull_IBrT @ measure.inverse_KTT[k]
    X_IBrT = W_I1rT - old_E_I1rT + pull_IBrT
    # C candidate codes for each; in a pass the old code is the first, so that the loss cannot rise.
    codes_IBCM = _shortlist(columns, X_IBrT, norm_TT, min(beam, _CODES))
    if measure.inverse_KTT is not None:
        old_I1M = columns.codes[columns.order[k]]
        old_IB1M = old_I1M[:, None].expand(-1, codes_IBCM.shape[1], -1, -1)
        codes_IBCM = torch.cat((old_IB1M, codes_IBCM), 2)
    W_hat_IBCrT = _decoded(columns, codes_IBCM)
    num_used = len(columns.W_RC) - tile_rows * (len(W_I1rT) - 1)
    E_IBCrT = W_I1rT[:, :, None] - W_hat_IBCrT
    E_IBCrT[-1, :, :, num_used:] = 0  # rows below the matrix cost nothing
    # Cost of a candidate: tr(gap norm gapᵀ), in a pass relative to that of the old code.
    gap_IBCrT = X_IBrT[:, :, None] - W_I1rT[:, :, None] + E_IBCrT
    cost_IBC = ((gap_IBCrT @ norm_TT) * gap_IBCrT).sum((3, 4))
    if measure.inverse_KTT is not None:
        cost_IBC = cost_IBC - cost_IBC[..., :1]
    loss_IBC = codings.loss_IB[..., None] + cost_IBC
    loss_IBC = loss_IBC.masked_fill(_repeated(codes_IBCM), torch.inf)
    # Of all B x C continuations of a row of tiles, the `beam` of least loss go on.
    num_best = min(beam, loss_IBC[0].numel())
    loss_IB, place_IB = loss_IBC.flatten(1).topk(num_best, largest=False)
    best = codings.chosen(place_IB // loss_IBC.shape[2])
    E_IBrT = _taken(E_IBCrT.flatten(1, 2), place_IB)
    best.E_IBrS[..., here] = E_IBrT
    # The new errors change the targets of the columns to the left.
    change_IBrT = E_IBrT - old_E_I1rT
    best.pull_IBrS[..., : here.start] += change_IBrT @ measure.A_CC[own, start : own.start]
    codes = (*best.codes, _taken(codes_IBCM.flatten(1, 2), place_IB))
    return replace(best, loss_IB=loss_IB, codes=codes)


def _shortlist(columns: TileColumns, X_IBrT: Tensor, norm_TT: Tensor, num: int) -> Tensor:
    """Up to `num` codes for each target, int32 [I, B, C, M]."""
    codec = columns.codec
    weight_EE = None
    if codec.weighted and columns.width > 1:  # within one column all errors weigh the same
        weight_EE = torch.block_diag(*[norm_TT] * codec.tile[0])
    return codec.shortlist(X_IBrT.flatten(2), columns.state, num, weight_EE)


def _decoded(columns: TileColumns, codes_IBCM: Tensor) -> Tensor:
    """[I, B, C, r, T]."""
    X_IXE = columns.codec.decode(codes_IBCM.flatten(1, 2), columns.state)
    return X_IXE.unflatten(1, codes_IBCM.shape[1:3]).unflatten(3, columns.codec.tile)


def _repeated(codes_IBCM: Tensor) -> Tensor:
    """Whether a code stands further to the front of its list as well, bool [I, B, C]."""
    same_IBCC = (codes_IBCM[:, :, :, None] == codes_IBCM[:, :, None]).all(4)
    return same_IBCC.tril(-1).any(3)


def _by_tile_row(A_RS: Tensor, tile_rows: int) -> Tensor:
    """[I, tile_rows, S], with zeros below the matrix."""
    padded = torch.nn.functional.pad(A_RS, (0, 0, 0, -len(A_RS) % tile_rows))
    return padded.unflatten(0, (-1, tile_rows))


def _taken(values: Tensor, index_IB: Tensor) -> Tensor:
    """Elements [I, B, ...] of the second axis of `values` by index."""
    index = index_IB.reshape(*index_IB.shape, *[1] * (values.dim() - 2))
    return values.gather(1, index.expand(-1, -1, *values.shape[2:]))
