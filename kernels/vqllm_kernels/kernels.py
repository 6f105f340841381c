"""What kernels are to the rest of the package: the protocol that those of every format follow.

A format has an object for each kind of kernels, "triton" on a CUDA device, "packed" and "lookup" on
a CPU. To
give a format kernels, add one file with a class that has the members of `Kernels` (for Triton,
derive it from `launch.TritonKernels`, which has the host side), and let the format's spec name it:

    class MySpec(FormatSpec):
        def kernels(self, kind):
            if kind == "triton":
                from vqllm_kernels.my_format.kernels import MyKernels  # it needs triton

                return MyKernels(self)
            return super().kernels(kind)

`select` asks the spec once for each kind of call, and `forward` and `ops` run what it returns. No
other file knows which formats have kernels. This one imports neither triton nor a format.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NoReturn, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vqllm_kernels.formats import FormatSpec
    from vqllm_kernels.transforms import HadamardSpec, ScaleSpec, TransformSpec

    Scales = Sequence[tuple[ScaleSpec, dict[str, Tensor]]]
    """Scales with their stored tensors."""

Tensors = dict[str, Tensor]

Kind = Literal["triton", "packed", "lookup"]

Operation = Literal["matmul", "decode", "transform"]

BATCH_BUCKETS = (8, 16, 32, 64)
"""Rows of x for which small-batch kernels are compiled; a call takes the first that holds it."""


def bucket(num_rows: int) -> int:
    """The smallest batch bucket that holds `num_rows` rows of x."""
    return next((b for b in BATCH_BUCKETS if num_rows <= b), BATCH_BUCKETS[-1] + 1)


@dataclass(frozen=True, kw_only=True)
class Call:
    """All that kernels may look at when they accept or decline.

    `batch` is a bucket of BATCH_BUCKETS, one more than the last for anything larger, and 0 for an
    operation without a batch.
    """

    operation: Operation
    spec: "FormatSpec | TransformSpec"
    device: torch.device
    dtype: torch.dtype
    batch: int = 0


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which bytes a product takes in place of x."""

    padded_cols: int
    """Integers of a token, a multiple of 4: those behind x are 0."""
    bit: int = 1
    """Columns are of two kinds, by this bit of their number."""
    factors: tuple[float, float] = (1.0, 1.0)
    """What x is multiplied by first, in columns of either kind."""
    offsets: tuple[float, float] = (0.0, 0.0)
    """What every weight of a column of either kind is to be increased by."""


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Activations in bytes, as `activations` makes them."""

    words: Tensor
    """int32 [N, parts, padded_cols / 4]: 4 int8 a word, the highest bytes of a token first."""
    step: Tensor
    """float32 [N, 2]: s, and s times the sum of the integers times their offsets."""
    dtype: torch.dtype
    """That of x."""

    @property
    def num_tokens(self) -> int:
        return self.words.shape[0]

    @property
    def parts(self) -> int:
        return self.words.shape[1]


Operand = Tensor | Quantized
"""x of a product: [N, cols], or the bytes that the kernels want in its place."""


def as_tensor(x: Operand) -> Tensor:
    """x of kernels that want no bytes. TypeError if it is in bytes all the same."""
    if isinstance(x, Quantized):
        raise TypeError("x is in bytes; these kernels take it as a tensor, as `wanted` says")
    return x


class Kernels(Protocol):
    """The kernels of one format of one kind: y = x Wᵀ and W, in the transformed basis."""

    @property
    def takes_blocks(self) -> bool:
        """Whether a large matrix is to be multiplied in blocks of rows (`LinearSpec.row_blocks`),
        because its weights are decoded first."""
        ...

    def declines(self, call: Call) -> str | None:
        """Why a call cannot be served, or None. Called once for each kind of call."""
        ...

    def wanted(self, x_NC: Tensor) -> Wanted | None:
        """The bytes that `matmuls` takes in place of x; None if it takes x as it is.

        `matmuls` takes x itself as well, and makes the bytes: what is asked here lets a transform
        of x write them.
        """
        ...

    def matmuls(
        self,
        x: Operand,
        tensors: Sequence[Tensors],
        rows: Sequence[int],
        cols: int,
        dtype: torch.dtype,
        adds: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """x Wᵀ (+ add) of each of several linears of one input, summed in float32 at least.

        Args:
            x: [N, cols], or what is `wanted`.
            tensors: the stored tensors of each linear, as in the format's `layout(rows, cols)`.
            rows: of each linear.
            dtype: of the results.
            adds: float32 [N, rows] of each, added before the one rounding.

        Returns:
            `dtype` [N, rows] of each.
        """
        ...

    def decode(
        self,
        tensors: Tensors,
        rows: int,
        cols: int,
        dtype: torch.dtype,
        add_RC: Tensor | None = None,
    ) -> Tensor:
        """W (+ add), rounded once to `dtype` [rows, cols].

        Args:
            tensors: the stored tensors of the linear.
            add_RC: float32 [rows, cols].
        """
        ...


@dataclass(frozen=True)
class NoKernels:
    """In place of kernels that a format does not have: declines every call."""

    reason: str
    takes_blocks: bool = False

    def declines(self, call: Call) -> str | None:
        return self.reason

    def wanted(self, x_NC: Tensor) -> Wanted | None:
        return None

    def matmuls(self, *args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(self.reason)

    def decode(self, *args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(self.reason)


class TransformKernels(Protocol):
    """The kernels of Hadamard transforms, with the scales that stand beside them."""

    def declines(self, call: Call) -> str | None:
        """Why a call cannot be served, or None."""
        ...

    def transforms(
        self,
        vs: Sequence[Tensor],
        specs: "Sequence[HadamardSpec]",
        tensors: Sequence[Tensors],
        direction: str,
        scales: "Sequence[Scales]",
    ) -> list[Tensor]:
        """x' = Q (s d x) for "input", y = s d (Qᵀ y') for "output", along the last axis, of each of
        several members; d is the product of the `scales`.

        Args:
            vs: [..., size] of each, of one dtype, which is that of the results.
            specs: transforms of one order.
            tensors: `signs` of each, one bit a feature.
            scales: what is multiplied with x before, or with y after, in this order.
        """
        ...

    def quantizes(self, spec: "HadamardSpec", dtype: torch.dtype) -> bool:
        """Whether `quantize` takes a transform of activations of `dtype`."""
        ...

    def quantize(
        self,
        v: Tensor,
        spec: "HadamardSpec",
        tensors: Tensors,
        scales: "Scales",
        wanted: Wanted,
    ) -> Quantized:
        """x' of `transforms` in bytes, not rounded to anything else before; v is [N, size]."""
        ...
