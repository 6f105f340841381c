"""A native type as a codec with fixed steps, so that every rounding rule can choose its codes."""

from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from vqllm.core.protocols import Codec, State
from vqllm.export import steps
from vqllm.export.native_types import TYPES, NativeType
from vqllm.export.packing import pack
from vqllm_kernels.formats import FormatSpec


class NativeCodec(Codec):
    """Codes of a native type. It is no part of recipes: nothing but a GGUF file stores it."""

    type: Literal["gguf"] = "gguf"
    native_type: str
    """name in `TYPES`"""

    @cached_property
    def native(self) -> NativeType:
        return TYPES[self.native_type]

    @property
    def tile(self) -> tuple[int, int]:
        return (1, 1)

    def spec(self) -> FormatSpec:
        raise NotImplementedError("llama.cpp multiplies by these codes; no kernel here does")

    def fit(self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator) -> State:
        """What `steps.fit_state` returns."""
        X_RC = X_IJE[..., 0]
        weight_RC = torch.ones_like(X_RC)
        if weight_IJE is not None:
            weight_RC = weight_IJE.expand_as(X_IJE)[..., 0]
        return steps.fit_state(self.native, X_RC, weight_RC)

    def encode(
        self, X_IJE: Tensor, state: State, col: int = 0, weight_E: Tensor | None = None
    ) -> Tensor:
        step_IJ, offset_IJ = self._of_columns(state, col, X_IJE.shape[1])
        ratio_IJ = torch.where(step_IJ == 0, 0.0, (X_IJE[..., 0] - offset_IJ) / step_IJ)
        return steps.nearest(self.native, ratio_IJ)[..., None]

    def decode(self, codes_IJM: Tensor, state: State, col: int = 0) -> Tensor:
        step_IJ, offset_IJ = self._of_columns(state, col, codes_IJM.shape[1])
        values_IJ = steps.reproduced(self.native, codes_IJM[..., 0])
        return (step_IJ * values_IJ + offset_IJ)[..., None]

    def pack(self, codes_IJM: Tensor, state: State) -> dict[str, Tensor]:
        """`blocks`, uint8 [R, bytes of a row], as GGUF files have them."""
        stored = {key: state[key].cpu() for key in ("d", "s", "dmin", "m") if key in state}
        return {"blocks": pack(self.native, codes_IJM[..., 0].cpu(), stored)}

    def unpack(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Tensor, State]:
        raise NotImplementedError("the package `gguf` reads these bytes")

    def _of_columns(self, state: State, col: int, num_cols: int) -> tuple[Tensor, Tensor]:
        """Step and offset of each of the columns from `col` on."""
        group = self.native.group
        if num_cols == 1:
            own = slice(col // group, col // group + 1)
            return state["step"][:, own], state["offset"][:, own]
        group_J = torch.arange(col, col + num_cols, device=state["step"].device) // group
        return state["step"][:, group_J], state["offset"][:, group_J]
