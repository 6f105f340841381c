"""Rounding with linear feedback: later columns compensate for the error of those already coded.

With H = L D Lᵀ in blocks of a tile's width, tile columns are coded from last to first,

    X_k = W_k + (W − Ŵ)_{>k} L_{>k,k}        Ŵ_k = nearest code of X_k

Then the proxy loss is Σ_k tr((X_k − Ŵ_k) D_k (X_k − Ŵ_k)ᵀ): a sum over tile columns, each of
which the codec makes small by itself. Rows of a tile are coded together. GPTQ is the same rule on
the reversed columns, in another arrangement of the arithmetic.

Example: one row, three columns, tiles of one weight, codes are the integers.

    W = (0.4, 0.4, 0.4)     H = | 4 2 2 |     L = |  1   0   0 |     D = (4, 2, 1.5)
                                | 2 3 2 |         | 0.5  1   0 |
                                | 2 2 3 |         | 0.5 0.5  1 |

    column k   target X_k                              code Ŵ_k   error E_k   gap X_k − Ŵ_k
    2          0.4                                     0           0.4         0.4
    1          0.4 + 0.4 · 0.5            =  0.6       1          -0.6        -0.4
    0          0.4 + (0.4 − 0.6) · 0.5    =  0.3       0           0.4         0.3

Column 2 is rounded down and loses 0.4. The factor L_21 = 0.5 adds half of that to the target of
column 1, which is now rounded up, and its error −0.6 has the opposite sign. Both errors go into the
target of column 0. H is positive here, so errors of opposite signs cancel in the output:

    to nearest    Ŵ = (0, 0, 0)    E = (0.4, 0.4, 0.4)     tr(E H Eᵀ) = 3.52
    LDLQ          Ŵ = (0, 1, 0)    E = (0.4, −0.6, 0.4)    tr(E H Eᵀ) = 0.92

The second loss is also Σ_k D_k (X_k − Ŵ_k)² = 4 · 0.3² + 2 · 0.4² + 1.5 · 0.4² = 0.92. Column 1
alone is worse than with rounding to nearest; the row is better.

The columns of a wide matrix are coded in stripes:

      start            end                     E = W − Ŵ is known right of `end`: one product
    ┌───┬──────────────┬─────────────┐         E L brings it into the stripe; inside the stripe
    │ W │◄── stripe ──►│  E (coded)  │         each tile column adds what the stripe's own coded
    └───┴──────────────┴─────────────┘         columns contribute
      ◄───── coded from last to first

A codec may fit the codebook of a group of columns when its turn comes, to the targets X as they are
by then (GPTVQ). Stripes then lie inside groups, and the product with what is right of the group is
made once for all of them.

Source: Chee et al., "QuIP", arXiv 2307.13304, algorithm 3; Tseng et al., "QuIP#", arXiv 2402.04396,
section 4.1 (blocks). Equality with GPTQ: QuIP, theorem 6; Frantar et al., arXiv 2210.17323.
Codebooks fitted inside the loop: van Baalen et al., "GPTVQ", arXiv 2402.15319.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from vqllm.core import linalg
from vqllm.core.protocols import Codec, Rounding, State
from vqllm.errors import RecipeError
from vqllm.rounding.base import ROUNDINGS
from vqllm.rounding.columns import TileColumns
from vqllm.rounding.coordinate import descend

STRIPE = 128
"""Columns of W between two products with all that is coded."""


@ROUNDINGS.register("ldlq")
class LDLQ(Rounding):
    """Block LDLQ for every tile shape, then coordinate descent."""

    rows_apart = True
    type: Literal["ldlq"] = "ldlq"
    order: Literal["natural", "hessian"] = Field(
        default="natural",
        description="natural: from the last column to the first; hessian: tile columns with the "
        "largest diagonal of H first, which costs nothing at run time and helps where no Hadamard "
        "transform has evened the diagonal out",
    )
    passes: int = Field(
        default=0,
        ge=0,
        description="coordinate-descent passes over all tile columns after the feedback pass",
    )

    def __call__(
        self, W_RC: Tensor, H_CC: Tensor, codec: Codec, state: State
    ) -> tuple[Tensor, State]:
        columns = self._columns(W_RC, H_CC, codec, state)
        E_RC = feedback(columns, STRIPE)
        for _ in range(self.passes):
            descend(columns, E_RC, STRIPE)
        return columns.result

    def refine(
        self, W_RC: Tensor, H_CC: Tensor, codec: Codec, codes_IJM: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """Coordinate descent from `codes_IJM`, at least one pass; the state stays as it is."""
        columns = self._columns(W_RC, H_CC, codec, state)
        E_RC = columns.keep_all(codes_IJM)
        for _ in range(max(self.passes, 1)):
            descend(columns, E_RC, STRIPE)
        return columns.result

    def _columns(self, W_RC: Tensor, H_CC: Tensor, codec: Codec, state: State) -> TileColumns:
        return TileColumns.of(W_RC, H_CC, codec, state, self.order)

    def check(self, codec: Codec) -> None:
        if self.order != "natural" and codec.refit_cols is not None:
            raise RecipeError(
                f"rounding ldlq: order {self.order} with codec {codec.type}, which fits a codebook "
                f"to every {codec.refit_cols} columns as their turn comes; that needs order "
                "natural. Sort the columns with a permutation transform, or set the codec's fit to "
                "once"
            )


def feedback(
    columns: TileColumns, stripe: int, factors: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Code all tile columns from last to first; returns W − Ŵ, [R, C].

    Args:
        columns: stores the codes.
        stripe: columns of W that are coded between two products with the whole of L.
        factors: L and D of the columns' H, if they are known.
    """
    W_RC, width = columns.W_RC, columns.width
    L_CC, D_KTT = factors or linalg.block_ldl(columns.H_CC, width)
    E_RC = torch.zeros_like(W_RC)
    for group in columns.groups():
        first, last = group.start * width, group.stop * width
        # X = W + E L has three parts, by where the coded columns are: right of the group, right of
        # the stripe, in the stripe. The first two are large products, made once for many columns.
        X_RG = W_RC[:, first:last]
        if group.stop < len(columns):
            X_RG = X_RG + E_RC[:, last:] @ L_CC[last:, first:last]
        # The codebook of the group is fitted to the targets, which the codes must reproduce.
        columns.refit(X_RG, group, D_KTT)
        for start_tile, end_tile in _stripes(group, max(stripe // width, 1)):
            start, end = start_tile * width, end_tile * width
            known = slice(end, last)
            X_RS = X_RG[:, start - first : end - first] + E_RC[:, known] @ L_CC[known, start:end]
            for k in reversed(range(start_tile, end_tile)):
                own = slice(k * width, (k + 1) * width)
                done = slice(own.stop, end)
                # X_k = W_k + E_{>k} L_{>k,k}, complete with the third part.
                X_RT = X_RS[:, own.start - start : own.stop - start]
                X_RT = X_RT + E_RC[:, done] @ L_CC[done, own]
                codes_I1M, W_hat_RT = columns.code(X_RT, k, D_KTT[k])
                columns.keep(codes_I1M, k)
                # The feedback uses the error W − Ŵ, not the gap X − Ŵ.
                E_RC[:, own] = W_RC[:, own] - W_hat_RT
    return E_RC


def _stripes(group: range, num_tiles: int) -> Iterator[tuple[int, int]]:
    """First tile column and the one after the last of each stripe of a group, from its end."""
    for end in range(group.stop, group.start, -num_tiles):
        yield max(end - num_tiles, group.start), end
