"""What every transform of one side of a linear can do at run time.

With the matrix A of the transform (invertible):

    side "in":   W' = W A⁻¹   H' = A H Aᵀ   x' = A x
    side "out":  W' = A W                    y  = A⁻¹ y'

float32 and float64 keep their precision; narrower types are computed in float32 and rounded once.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from vqllm_kernels.layout import TensorLayout, not_finite

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class TransformSpec(ABC):
    """One transform of one side of a linear, with its `size` (features of that side)."""

    kind: ClassVar[str]
    side: Literal["in", "out"]
    size: int

    def __post_init__(self) -> None:
        if self.side not in ("in", "out"):
            raise ValueError(f"side {self.side!r} of a transform is neither 'in' nor 'out'")
        if self.size < 1:
            raise ValueError(f"a transform needs at least 1 feature, not {self.size}")

    @abstractmethod
    def layout(self) -> dict[str, TensorLayout]:
        """The stored tensors."""

    @abstractmethod
    def apply(self, v: Tensor, tensors: Tensors) -> Tensor:
        """A v along the last axis."""

    @abstractmethod
    def apply_inverse(self, v: Tensor, tensors: Tensors) -> Tensor:
        """A⁻¹ v along the last axis."""

    @abstractmethod
    def apply_inverse_transpose(self, v: Tensor, tensors: Tensors) -> Tensor:
        """A⁻ᵀ v along the last axis: what side "in" does to the rows of W."""

    @abstractmethod
    def apply_transpose(self, v: Tensor, tensors: Tensors) -> Tensor:
        """Aᵀ v along the last axis: the inverse of `apply_inverse_transpose`."""

    def problem(self, tensors: Tensors) -> str | None:
        """What is wrong with the values of the stored tensors, or None."""
        return not_finite(tensors)

    def input(self, x: Tensor, tensors: Tensors) -> Tensor:
        """x' from x, any leading axes (side "in")."""
        return self.apply(x, tensors)

    def output(self, y: Tensor, tensors: Tensors) -> Tensor:
        """y from y', any leading axes (side "out")."""
        return self.apply_inverse(y, tensors)

    def forward(self, W: Tensor, tensors: Tensors) -> Tensor:
        """W' from W."""
        if self.side == "in":
            return self.apply_inverse_transpose(W, tensors)
        return self.apply(W.T, tensors).T

    def forward_hessian(self, H: Tensor, tensors: Tensors) -> Tensor:
        """H' = A H Aᵀ of a symmetric H, symmetric to the last bit (side "out" leaves H alone)."""
        if self.side == "out":
            return H
        A_H_At = self.apply(self.apply(H, tensors).T, tensors)
        return (A_H_At + A_H_At.T).mul_(0.5)

    def inverse(self, W: Tensor, tensors: Tensors) -> Tensor:
        """W from W'."""
        if self.side == "in":
            return self.apply_transpose(W, tensors)
        return self.apply_inverse(W.T, tensors).T

    def to_dict(self) -> dict[str, Any]:
        """JSON values without `size`, which the linear gives."""
        values = {k: v for k, v in asdict(self).items() if k != "size"}
        return {"kind": self.kind, **values}
