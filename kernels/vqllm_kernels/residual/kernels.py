"""Kernels of residual-v1, of either kind: those of its stages, one after the other.

Each stage but the last writes float32, which the next one adds to its own sums before it rounds, so
a sum of stages is rounded once, and costs one launch a stage and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vqllm_kernels.kernels import Call, Kernels, Operand, Tensors, Wanted
from vqllm_kernels.residual.reference import stage_tensors

if TYPE_CHECKING:
    from vqllm_kernels.residual.spec import ResidualSpec


@dataclass(frozen=True)
class ResidualKernels:
    """The `Kernels` of a sum of stages."""

    spec: "ResidualSpec"
    stages: tuple[Kernels, ...]
    """Those of `spec.stages`."""

    @property
    def takes_blocks(self) -> bool:
        return False

    def declines(self, call: Call) -> str | None:
        """The reason of the first stage that has one, or None."""
        for i, (stage, spec) in enumerate(zip(self.stages, self.spec.stages, strict=True)):
            reason = stage.declines(replace(call, spec=spec))
            if reason is not None:
                return f"stage {i}: {reason}"
        return None

    def wanted(self, x_NC: Tensor) -> Wanted | None:
        """What all stages take in place of x, if it is the same."""
        first, *others = [stage.wanted(x_NC) for stage in self.stages]
        return first if all(other == first for other in others) else None

    def matmuls(
        self,
        x: Operand,
        tensors: Sequence[Tensors],
        rows: Sequence[int],
        cols: int,
        dtype: torch.dtype,
        adds: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        # Bytes that all stages take are made once.
        if isinstance(x, Tensor) and len(x) and (shared := self.wanted(x)):
            from vqllm_kernels import activations  # it needs triton

            x = activations.quantized(x, shared)
        *first_stages, last = self.stages
        for i, stage in enumerate(first_stages):
            own = [stage_tensors(every, i) for every in tensors]
            adds = stage.matmuls(x, own, rows, cols, torch.float32, adds)
        own = [stage_tensors(every, len(first_stages)) for every in tensors]
        return last.matmuls(x, own, rows, cols, dtype, adds)

    def decode(
        self,
        tensors: Tensors,
        rows: int,
        cols: int,
        dtype: torch.dtype,
        add_RC: Tensor | None = None,
    ) -> Tensor:
        *first_stages, last = self.stages
        for i, stage in enumerate(first_stages):
            add_RC = stage.decode(stage_tensors(tensors, i), rows, cols, torch.float32, add_RC)
        own = stage_tensors(tensors, len(first_stages))
        return last.decode(own, rows, cols, dtype, add_RC)
