"""A native type as a codec with fixed steps, so that every rounding rule can choose its codes."""

from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vqllm.core.protocols import Codec, State
from vqllm.export import grids, steps
from vqllm.export.native_types import TYPES, NativeType
from vqllm.export.packing import pack
from vqllm_kernels.formats import FormatSpec


class NativeCodec(Codec):
    """Codes of a native type. It is no part of recipes: nothing but a GGUF file stores it."""

    weighted: ClassVar[bool] = True
    type: Literal["gguf"] = "gguf"
    native_type: str
    """name in `TYPES`"""

    @cached_property
    def native(self) -> NativeType:
        return TYPES[self.native_type]

    @property
    def tile(self) -> tuple[int, int]:
        return (1, self.native.tile_cols)

    @property
    def num_symbols(self) -> int:
        grid = self.native.grid
        return 1 if grid is None else self.native.tile_cols // grid.width + 1

    def spec(self) -> FormatSpec:
        raise NotImplementedError("llama.cpp multiplies by these codes; no kernel here does")

    def fit(self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator) -> State:
        """What `steps.fit_state` returns."""
        weight_RC = torch.ones_like(X_IJE).flatten(1)
        if weight_IJE is not None:
            weight_RC = weight_IJE.expand_as(X_IJE).flatten(1)
        return steps.fit_state(self.native, X_IJE.flatten(1), weight_RC)

    def encode(
        self, X_IJE: Tensor, state: State, col: int = 0, weight_E: Tensor | None = None
    ) -> Tensor:
        step_IJ, offset_IJ = self._of_columns(state, col, X_IJE.shape[1])
        step_IJ1, offset_IJ1 = step_IJ[..., None], offset_IJ[..., None]
        ratio_IJE = torch.where(step_IJ1 == 0, 0.0, (X_IJE - offset_IJ1) / step_IJ1)
        if self.native.grid is None:
            return steps.nearest(self.native, ratio_IJE)
        ratio_TE = ratio_IJE.flatten(0, 1)
        if weight_E is None:
            codes_TM = grids.nearest(self.native, ratio_TE, torch.ones_like(ratio_TE))
        else:
            D_EE = weight_E if weight_E.dim() == 2 else None
            diagonal_E = weight_E if D_EE is None else torch.diagonal(D_EE)
            codes_TM = grids.nearest(self.native, ratio_TE, diagonal_E.expand_as(ratio_TE), D_EE)
        return codes_TM.unflatten(0, X_IJE.shape[:2])

    def decode(self, codes_IJM: Tensor, state: State, col: int = 0) -> Tensor:
        step_IJ, offset_IJ = self._of_columns(state, col, codes_IJM.shape[1])
        return step_IJ[..., None] * self.values(codes_IJM) + offset_IJ[..., None]

    def values(self, codes_IJM: Tensor) -> Tensor:
        """What codes mean before steps and offsets, float32 [I, J, E]."""
        if self.native.grid is None:
            return steps.reproduced(self.native, codes_IJM)
        return grids.reproduced(self.native, codes_IJM)

    def pack(self, codes_IJM: Tensor, state: State) -> dict[str, Tensor]:
        """`blocks`, uint8 [R, bytes of a row], as GGUF files have them."""
        stored = {key: state[key].cpu() for key in ("d", "s", "dmin", "m") if key in state}
        return {"blocks": pack(self.native, codes_IJM.cpu(), stored)}

    def unpack(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Tensor, State]:
        raise NotImplementedError("the package `gguf` reads these bytes")

    def _of_columns(self, state: State, col: int, num_cols: int) -> tuple[Tensor, Tensor]:
        """Step and offset of each of the tile columns from `col` on."""
        tiles = self.native.group // self.native.tile_cols
        if num_cols == 1:
            own = slice(col // tiles, col // tiles + 1)
            return state["step"][:, own], state["offset"][:, own]
        group_J = torch.arange(col, col + num_cols, device=state["step"].device) // tiles
        return state["step"][:, group_J], state["offset"][:, group_J]
