"""The `Kernels` of a format whose codes are multiplied as they are stored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vqllm_kernels.compilers import why_no_numba
from vqllm_kernels.kernels import Call, Operand, Tensors, as_tensor
from vqllm_kernels.reference import ReferenceKernels, sums

if TYPE_CHECKING:
    from vqllm_kernels.cpu.parts import Part


@dataclass(frozen=True, kw_only=True)
class PackedKernels(ReferenceKernels):
    """Products with the codes of one format.

    x is rounded to 16 bits, which is finer than bfloat16 and float16 and coarser than float32:
    activations of float32 are left to others.
    """

    parts: Callable[[Tensors], "Sequence[Part]"]
    """The codes of stored tensors with their kernels, as `cpu.parts` says."""
    reason: str | None = None
    """Why no linear of this spec can be multiplied, or None."""
    wide_only: bool = False
    """Whether decoded weights are faster without AVX-512."""

    @property
    def takes_blocks(self) -> bool:
        return False

    def declines(self, call: Call) -> str | None:
        if self.reason is not None:
            return self.reason
        if call.dtype not in (torch.bfloat16, torch.float16):
            return f"{call.dtype} has more digits than the 16 bits that x is rounded to"
        return missing(self.wide_only)

    @property
    def note(self) -> str | None:
        """The instructions, where they are not the fastest ones."""
        from vqllm_kernels.cpu import instructions

        return instructions.why_not_faster()

    def matmuls(
        self,
        x: Operand,
        tensors: Sequence[Tensors],
        rows: Sequence[int],
        cols: int,
        dtype: torch.dtype,
        adds: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        from vqllm_kernels.cpu.bound import without_transforms

        x_NC = as_tensor(x)
        if len(x_NC) == 0:
            return [x_NC.new_empty(0, own, dtype=dtype) for own in rows]
        linears = without_transforms([self.parts(own) for own in tensors], rows, cols)
        ys = linears(x_NC)
        if ys is None:
            return super().matmuls(x, tensors, rows, cols, dtype, adds)
        return sums(ys, adds, dtype)


def missing(wide_only: bool = False) -> str | None:
    """What this machine lacks for packed products that are faster than others, or None.

    Who chose a set of instructions is not told that another is faster.
    """
    if problem := why_no_numba():
        return problem
    from vqllm_kernels.cpu import instructions

    own = instructions.instructions()
    if own == "avx512" or instructions.is_chosen():
        return None
    if wide_only:
        return f"{instructions.why_not_faster()}: decoded weights are faster"
    if own == "portable":
        return f"{instructions.why_not_faster()}, nor AVX2: decoded weights are faster"
    return None
