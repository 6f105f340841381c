"""Codes and steps of a matrix in a native type, given H.

    steps for diag(H) ─► LDLQ ─► (steps for the codes ─► codes for the steps) a few times

H is the shrunken one throughout: its entries off the diagonal times `SHRINKAGE`. These types have
no rotation before them, so a few columns carry much of H, and codes that make up for errors in them
fit the calibration text and little else: with the whole H the loss on that text falls further, and
the model gets worse on other text. docs/gguf.md has what the whole rule reaches.

Given the codes, Ŵ is linear in each stored number, so that the best one follows from E H: a change
δ of the step of a group with values V changes the loss by −2 δ (E H) Vᵀ + δ² V H Vᵀ.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vqllm.core import linalg
from vqllm.core.protocols import State
from vqllm.core.tiles import to_tiles
from vqllm.export import steps
from vqllm.export.native_codec import NativeCodec
from vqllm.export.native_types import NativeType
from vqllm.rounding.columns import TileColumns
from vqllm.rounding.coordinate import descend
from vqllm.rounding.ldlq import STRIPE, feedback

SHRINKAGE = 0.8
DAMPING = 0.01
PASSES = 1
"""Times that steps, then codes, are chosen again."""
VECTOR_PASSES = 2
"""The same, of vectors: there are fewer of them, and a pass takes less time."""


@dataclass(frozen=True)
class NativeMatrix:
    """A matrix as a GGUF file stores it, and what it decodes to."""

    blocks_RB: Tensor
    """uint8 [R, bytes of a row]"""
    W_hat_RC: Tensor


def round_to_nearest(native: NativeType, W_RC: Tensor) -> NativeMatrix:
    """A matrix of which no H is known: an embedding, an output head."""
    codec = NativeCodec(native_type=native.name)
    X_IJE = to_tiles(W_RC.float(), codec.tile)
    state = codec.fit(X_IJE, None, torch.Generator())
    codes_IJM = codec.encode(X_IJE, state)
    return NativeMatrix(
        codec.pack(codes_IJM, state)["blocks"], codec.decode(codes_IJM, state).flatten(1)
    )


def round_matrix(
    native: NativeType,
    W_RC: Tensor,
    H_CC: Tensor,
    shrinkage: float = SHRINKAGE,
    passes: int | None = None,
) -> NativeMatrix:
    """Choose steps and codes.

    Args:
        W_RC: weights, float32; the blocks of the type divide C.
        H_CC: E[x xᵀ], float32, as measured.
        shrinkage: of its entries off the diagonal.
        passes: times that steps, then codes, are chosen again; None for the default of the type.

    Raises:
        NumericalError: an H that cannot be factorized.
    """
    codec = NativeCodec(native_type=native.name)
    if passes is None:
        passes = PASSES if native.grid is None else VECTOR_PASSES
    H_CC = linalg.damp(H_CC, DAMPING, shrinkage)
    weight_RC = torch.diagonal(H_CC).expand(W_RC.shape)
    state = steps.fit_state(native, W_RC, weight_RC)
    columns = TileColumns.of(W_RC, H_CC, codec, state)
    E_RC = feedback(columns, STRIPE)
    for _ in range(passes):
        columns.state, E_RC = fit_steps(codec, columns, E_RC)
        descend(columns, E_RC, STRIPE)
    codes_IJM, state = columns.result
    W_hat_RC = codec.decode(codes_IJM, state).flatten(1)
    return NativeMatrix(codec.pack(codes_IJM, state)["blocks"], W_hat_RC)


def fit_steps(codec: NativeCodec, columns: TileColumns, E_RC: Tensor) -> tuple[State, Tensor]:
    """The state with steps and offsets that are better for the codes, and its W − Ŵ.

    No stored number is changed unless the loss falls with it.
    """
    native, codes_IJM = codec.native, columns.codes_IJM
    values_RC = codec.values(codes_IJM).flatten(1)
    state = dict(columns.state)
    fit = _Fit(native, columns.H_CC, values_RC, state, E_RC.clone())
    for group in range(state["step"].shape[1]):
        fit.step_of(group)
        if native.has_offset:
            fit.offset_of(group)
    if native.scales is not None:
        for block in range(state["d"].shape[1]):
            fit.d_of(block, "d", "s", values_RC)
            if native.has_offset:
                fit.d_of(block, "dmin", "m", -torch.ones_like(values_RC))
    state = steps.with_steps(native, fit.state)
    E_RC = columns.W_RC - codec.decode(codes_IJM, state).flatten(1)
    return state, E_RC


@dataclass
class _Fit:
    """Least squares in one stored number of every row at a time."""

    native: NativeType
    H_CC: Tensor
    values_RC: Tensor
    state: State
    """the stored tensors are replaced as they change"""
    E_RC: Tensor

    def step_of(self, group: int) -> None:
        """The step of a group: d itself, or its integer."""
        cols = self._cols(group, self.native.group)
        V_Rn = self.values_RC[:, cols]
        if self.native.scales is None:
            self._change("d", group, cols, V_Rn, None)
        else:
            per_integer = self.native.scaled_by[1] * self._of_block("d", group)
            self._change("s", group, cols, V_Rn * per_integer, self.native.scales)

    def offset_of(self, group: int) -> None:
        """The offset of a group: float16 itself, or its integer."""
        cols = self._cols(group, self.native.group)
        ones_Rn = torch.ones_like(self.values_RC[:, cols])
        if self.native.max_min is None:
            self._change("dmin", group, cols, ones_Rn, None)
        else:
            V_Rn = -self._of_block("dmin", group) * ones_Rn
            self._change("m", group, cols, V_Rn, (0, self.native.max_min))

    def d_of(self, block: int, key: str, integers: str, values_RC: Tensor) -> None:
        """The float16 of a block, whose integers stay."""
        cols = self._cols(block, self.native.block)
        groups = slice(cols.start // self.native.group, cols.stop // self.native.group)
        s_Rn = self.state[integers][:, groups].repeat_interleave(self.native.group, 1)
        if key == "d":
            s_Rn = steps.scaled(self.native, s_Rn)
        self._change(key, block, cols, values_RC[:, cols] * s_Rn, None)

    def _cols(self, index: int, size: int) -> slice:
        return slice(index * size, (index + 1) * size)

    def _of_block(self, key: str, group: int) -> Tensor:
        block = group * self.native.group // self.native.block
        return self.state[key][:, block, None].float()

    def _change(
        self, key: str, index: int, cols: slice, V_Rn: Tensor, limits: tuple[int, int] | None
    ) -> None:
        """Bring column `index` of a stored tensor nearer to its best values.

        Args:
            V_Rn: how Ŵ changes in these columns when it grows by 1.
            limits: of an integer; None for float16.
        """
        gradient_R = ((self.E_RC @ self.H_CC[:, cols]) * V_Rn).sum(1)
        curvature_R = ((V_Rn @ self.H_CC[cols, cols]) * V_Rn).sum(1)
        stored = self.state[key]
        old_R = stored[:, index].float()
        wanted_R = old_R + torch.where(curvature_R > 0, gradient_R / curvature_R, 0.0)
        if limits is None:
            new_R = steps.half(wanted_R).float()
        else:
            new_R = wanted_R.round().clamp(*limits)
        change_R = new_R - old_R
        better_R = change_R * (change_R * curvature_R - 2 * gradient_R) < 0
        change_R = torch.where(better_R, change_R, 0.0)
        changed = stored.clone()
        changed[:, index] = torch.where(better_R, new_R, old_R).to(stored.dtype)
        self.state[key] = changed
        self.E_RC[:, cols] -= change_R[:, None] * V_Rn
