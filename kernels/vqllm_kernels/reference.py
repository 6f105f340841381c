"""What runs where there are no kernels: products with decoded weights, transforms in torch.

`ReferenceKernels` are the definition of a format, with products in float32; `DenseKernels` multiply
in the dtype of x, which is what a GPU is fast at; `ReferenceTransforms` are the definition of a
Hadamard transform.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vqllm_kernels.formats import FormatSpec
from vqllm_kernels.kernels import (
    Call,
    Kernels,
    Operand,
    Quantized,
    Tensors,
    Wanted,
    as_tensor,
)
from vqllm_kernels.transforms import HadamardSpec

if TYPE_CHECKING:
    from vqllm_kernels.kernels import Scales


@dataclass(frozen=True, kw_only=True)
class ReferenceKernels:
    """The `Kernels` of a format by its definition, for every call."""

    spec: FormatSpec

    @property
    def takes_blocks(self) -> bool:
        return True

    def declines(self, call: Call) -> str | None:
        return None

    def wanted(self, x_NC: Tensor) -> Wanted | None:
        return None

    def matmuls(
        self,
        x: Operand,
        tensors: Sequence[Tensors],
        rows: Sequence[int],
        cols: int,
        dtype: torch.dtype,
        adds: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        x_NC = as_tensor(x)
        wide = torch.promote_types(x_NC.dtype, torch.float32)
        x_NC = x_NC.to(wide)
        ys = [
            x_NC @ self.spec.decode(own, num_rows, cols).to(wide).T
            for own, num_rows in zip(tensors, rows, strict=True)
        ]
        return sums(ys, adds, dtype)

    def decode(
        self,
        tensors: Tensors,
        rows: int,
        cols: int,
        dtype: torch.dtype,
        add_RC: Tensor | None = None,
    ) -> Tensor:
        W_RC = self.spec.decode(tensors, rows, cols)
        return (W_RC if add_RC is None else W_RC + add_RC).to(dtype)


@dataclass(frozen=True, kw_only=True)
class DenseKernels(ReferenceKernels):
    """Products in the dtype of x, with weights that other kernels decode."""

    decoder: Callable[[Tensors, torch.dtype], Kernels]
    """What decodes stored tensors to a dtype."""

    def matmuls(
        self,
        x: Operand,
        tensors: Sequence[Tensors],
        rows: Sequence[int],
        cols: int,
        dtype: torch.dtype,
        adds: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        x_NC = as_tensor(x)
        ys = []
        for own, num_rows in zip(tensors, rows, strict=True):
            W_RC = self.decoder(own, x_NC.dtype).decode(own, num_rows, cols, x_NC.dtype)
            ys.append(x_NC @ W_RC.T)
        return sums(ys, adds, dtype)


def sums(ys: Sequence[Tensor], adds: Sequence[Tensor] | None, dtype: torch.dtype) -> list[Tensor]:
    """y (+ add) of each in `dtype`."""
    if adds is None:
        return [y.to(dtype) for y in ys]
    return [(y + add).to(dtype) for y, add in zip(ys, adds, strict=True)]


@dataclass(frozen=True)
class ReferenceTransforms:
    """The `TransformKernels` by definition; narrow types are rounded once, at the end."""

    def declines(self, call: Call) -> str | None:
        return None

    def transforms(
        self,
        vs: Sequence[Tensor],
        specs: Sequence[HadamardSpec],
        tensors: Sequence[Tensors],
        direction: str,
        scales: "Sequence[Scales]",
    ) -> list[Tensor]:
        members = zip(vs, specs, tensors, scales, strict=True)
        return [self._transform(*member, direction) for member in members]

    def _transform(
        self, v: Tensor, spec: HadamardSpec, tensors: Tensors, scales: "Scales", direction: str
    ) -> Tensor:
        out = v.to(torch.promote_types(v.dtype, torch.float32))
        if direction == "input":
            for scale, own in scales:
                out = scale.input(out, own)
            return spec.input(out, tensors).to(v.dtype)
        out = spec.output(out, tensors)
        for scale, own in scales:
            out = scale.output(out, own)
        return out.to(v.dtype)

    def quantizes(self, spec: HadamardSpec, dtype: torch.dtype) -> bool:
        return False

    def quantize(
        self,
        v: Tensor,
        spec: HadamardSpec,
        tensors: Tensors,
        scales: "Scales",
        wanted: Wanted,
    ) -> Quantized:
        raise NotImplementedError("the reference writes no bytes, as `quantizes` says")
