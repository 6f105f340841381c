"""Rounding with feedback on both sides: errors are compensated along rows and down columns.

The model's loss grows with an error E = W − Ŵ by tr(H_O E H Eᵀ), with H over the inputs and H_O
[R, R] over the outputs: its curvature as a Kronecker product. With H_O = L_O D_O L_Oᵀ in blocks of
rows and H = L D Lᵀ in tile columns, both lower triangular with identity blocks on the diagonal,
blocks of rows are coded from last to first,

    A_b = W_b + (L_Oᵀ (W − Ŵ))_b     over the rows after block b
    Ŵ_b = LDLQ of A_b with H

which leaves Σ_b Σ_k tr(D_O,b G D_k Gᵀ) of the gaps G between targets and codes to the codec.

      rows                          one block at a time, last first; the errors of the rows
    ┌──────────────────┐            below it go into its target, and LDLQ goes over its
    │   W              │            columns
    ├──────────────────┤ ▲
    │ ◄── block b ──►  │ │
    ├──────────────────┤ │
    │   E (coded)      │ │
    └──────────────────┘

Inside a block of rows the outputs count as uncoupled. H_O = I is LDLQ.

A codec that codes all tiles alike gets those of several blocks at a time (`diagonals.py`).

Source: Tseng et al., "YAQA", arXiv 2505.22988, section 3.1: its update W + L_Oᵀ ΔW L_I + L_Oᵀ ΔW +
ΔW L_I with strictly triangular parts is (I + L_O)ᵀ ΔW (I + L_I), the same in one formula. YAQA goes
along anti-diagonals of single tiles; blocks of whole rows need H's factors once.
"""

import logging
import math
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from vqllm.core import linalg
from vqllm.core.protocols import Codec, OutputRounding, State
from vqllm.errors import NumericalError, RecipeError
from vqllm.rounding.base import ROUNDINGS
from vqllm.rounding.columns import PADDING, TileColumns
from vqllm.rounding.diagonals import code_along_diagonals
from vqllm.rounding.ldlq import STRIPE, feedback

logger = logging.getLogger(__name__)


@ROUNDINGS.register("two_sided")
class TwoSided(OutputRounding):
    """LDLQ over rows and columns."""

    type: Literal["two_sided"] = "two_sided"
    order: Literal["natural", "hessian"] = Field(
        default="natural", description="of the columns, as in ldlq"
    )
    rows: int = Field(
        default=64,
        ge=1,
        description="rows that are coded together, rounded up to whole tiles; fewer give more "
        "feedback and take longer",
    )
    damping: float = Field(
        default=0.01,
        gt=0,
        le=10,
        description="added to the diagonal of the outputs' H, relative to its mean",
    )
    _output_RR: Tensor | None = PrivateAttr(default=None)

    def with_outputs(self, output_RR: Tensor) -> "TwoSided":
        """This rule for a linear whose outputs have this H, symmetric, not damped."""
        bound = self.model_copy()
        bound._output_RR = output_RR
        return bound

    def __call__(
        self, W_RC: Tensor, H_CC: Tensor, codec: Codec, state: State
    ) -> tuple[Tensor, State]:
        assert self._output_RR is not None, "with_outputs comes first"
        tile_rows = codec.tile[0]
        rows = -(-self.rows // tile_rows) * tile_rows
        columns = TileColumns.of(W_RC, H_CC, codec, state, self.order)
        factors = linalg.block_ldl(columns.H_CC, columns.width)
        L_RR = self._output_feedback(rows)
        if columns.codec.alike and columns.outer is None:
            return code_along_diagonals(columns, factors[0], L_RR, rows), state
        W_RC = columns.W_RC
        E_RC = torch.zeros_like(W_RC)
        codes: list[Tensor] = []
        for start in reversed(range(0, len(W_RC), rows)):
            own, after = slice(start, min(start + rows, len(W_RC))), slice(start + rows, len(W_RC))
            # A_b = W_b + (L_Oᵀ E)_b over the rows after the block, which are coded already.
            pull_rC = L_RR[after, own].T @ E_RC[after]
            block = replace(columns, W_RC=W_RC[own] + pull_rC, codes={})
            # LDLQ returns A − Ŵ; E is the error against W = A − pull.
            E_RC[own] = feedback(block, STRIPE, factors) - pull_rC
            codes.insert(0, block.codes_IJM)
        return torch.cat(codes), state

    def _output_feedback(self, rows: int) -> Tensor:
        """L of the damped H of the outputs, in blocks of `rows`.

        The stored entries of H are rounded, which can make it indefinite. Then more damping is
        added, up to its mean diagonal; NumericalError if that does not suffice.
        """
        assert self._output_RR is not None
        damping = self.damping
        while True:
            damped = _padded(linalg.damp(self._output_RR, damping), rows)
            try:
                return linalg.block_ldl(damped, rows)[0]
            except NumericalError:
                if damping >= 1:
                    raise
                damping = min(1.0, damping * math.sqrt(10))
                logger.warning(
                    "the Hessian of %d outputs is not positive definite: damping %.3g in place of "
                    "%.3g",
                    *(len(self._output_RR), damping, self.damping),
                )

    def check(self, codec: Codec) -> None:
        layout = codec.spec().layout(16 * codec.tile[0], codec.refit_cols or 16 * codec.tile[1])
        by_row = [name for name, tensor in layout.items() if tensor.by_tile_row]
        if codec.refit_cols is not None or len(by_row) > 1:
            raise RecipeError(
                f"rounding two_sided: codec {codec.type} with these options learns something for "
                "every row or group of rows or columns, and this rule codes a few rows at a time. "
                "Use a codec that codes all tiles alike, such as trellis, e8p, leech, pyramid or "
                "kmeans; or rounding ldlq"
            )


def _padded(H_RR: Tensor, rows: int) -> Tensor:
    """With rows that are coupled to nothing, up to whole blocks."""
    missing = -len(H_RR) % rows
    padded = torch.nn.functional.pad(H_RR, (0, missing, 0, missing))
    if missing:
        torch.diagonal(padded)[-missing:] = PADDING * torch.diagonal(H_RR).mean()
    return padded
