"""Coordinate descent as a rule: codes, outliers and scales in turn, the others as they are.

    codes       passes of `vqllm.rounding.coordinate` over all tile columns
    outliers    after each pass, of a codec that stores some weights apart
                (`vqllm.rounding.coordinate_outliers`)
    state       after each pass, if asked for: scales, codebooks and whatever else the codec learned
                are solved for least loss (`vqllm.core.least_squares`)

None of the three raises the loss, so it falls until nothing changes or a pass gains too little.

Source: Behdin et al., "QuantEase", arXiv 2309.01885 (codes and outliers, from W itself, in the
order of diag H); Zhang et al., "COMQ", arXiv 2403.07134 (codes and scales, weights of large
‖x_j‖ |w_ij| first: an order for each row, where here tile columns are coded in all rows at once).
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from vqllm.core import threads
from vqllm.core.least_squares import StateProblem
from vqllm.core.protocols import Codec, Rounding, State
from vqllm.core.tiles import to_tiles
from vqllm.errors import RecipeError
from vqllm.rounding import coordinate_outliers
from vqllm.rounding.base import ROUNDINGS
from vqllm.rounding.columns import Order, TileColumns
from vqllm.rounding.coordinate import descend
from vqllm.rounding.ldlq import feedback

STRIPE = 128
"""Columns of W between two products with all of H."""
_STEPS = 10
"""Conjugate-gradient steps for the state after a pass; row scales need one, codebooks 5 to 10."""


@ROUNDINGS.register("coordinate")
class Coordinate(Rounding):
    """Coordinate descent from a start, over codes, outliers and (if asked) scales."""

    type: Literal["coordinate"] = "coordinate"
    start: Literal["nearest", "weights", "ldlq"] = Field(
        default="nearest",
        description="what the passes begin with: every tile rounded to nearest; the weights "
        "themselves (the first pass is one of feedback); the codes of LDLQ",
    )
    order: Order = Field(
        default="natural",
        description="natural: from the last column to the first; hessian: tile columns with the "
        "largest diagonal of H first; energy: those with the largest tr(W_k H_kk W_k^T) first",
    )
    passes: int = Field(default=4, ge=1, description="passes over all tile columns, at most")
    tolerance: float = Field(
        default=0.001,
        ge=0,
        lt=1,
        description="the passes end when one lowers the loss by a smaller share",
    )
    state: Literal["fixed", "solved"] = Field(
        default="fixed",
        description="solved: after every pass scales and codebooks are solved for least loss, "
        "codes as they are",
    )

    def __call__(
        self, W_RC: Tensor, H_CC: Tensor, codec: Codec, state: State
    ) -> tuple[Tensor, State]:
        columns = TileColumns.of(W_RC, H_CC, codec, state, self.order)
        if self.start == "nearest":
            E_RC = columns.keep_all(codec.encode(to_tiles(W_RC, codec.tile), state))
        elif self.start == "weights":
            E_RC = torch.zeros_like(columns.W_RC)
        else:
            E_RC = feedback(columns, STRIPE)
        self._descend(columns, E_RC, H_CC)
        return columns.result

    def refine(
        self, W_RC: Tensor, H_CC: Tensor, codec: Codec, codes_IJM: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """The passes alone, which do not raise the loss of `codes_IJM`."""
        columns = TileColumns.of(W_RC, H_CC, codec, state, self.order)
        self._descend(columns, columns.keep_all(codes_IJM), H_CC)
        return columns.result

    def _descend(self, columns: TileColumns, E_RC: Tensor, H_CC: Tensor) -> None:
        loss = float("inf")
        if columns.codes:
            loss = _loss(E_RC, columns.H_CC)
        for _ in range(self.passes):
            descend(columns, E_RC, STRIPE)
            if columns.outer is not None:
                coordinate_outliers.move(columns, E_RC)
            if self.state == "solved":
                E_RC = self._solve(columns, H_CC)
            before, loss = loss, _loss(E_RC, columns.H_CC)
            if loss >= (1 - self.tolerance) * before:
                break

    def _solve(self, columns: TileColumns, H_CC: Tensor) -> Tensor:
        """The state of least loss for the codes; returns W − Ŵ, in the order of the columns."""
        W_RC = columns.in_grid_order(columns.W_RC)[:, : len(H_CC)]
        problem = StateProblem(W_RC, H_CC, columns.codec, columns.codes_IJM)
        columns.state, _ = problem.improved(columns.state, _STEPS)
        return columns.keep_all(columns.codes_IJM)

    @property
    def tunes_state(self) -> bool:
        return self.state == "solved"

    def check(self, codec: Codec) -> None:
        if self.start == "ldlq" and self.order != "natural" and codec.refit_cols is not None:
            raise RecipeError(
                f"rounding coordinate: start ldlq in order {self.order} with codec {codec.type}, "
                f"which fits a codebook to every {codec.refit_cols} columns as their turn comes; "
                "that needs order natural. Choose another start, or set the codec's fit to once"
            )


def _loss(E_RC: Tensor, H_CC: Tensor) -> float:
    """tr(E H Eᵀ)."""
    return float(threads.total((E_RC @ H_CC).double() * E_RC))
