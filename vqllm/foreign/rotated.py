"""Weights between two Hadamard transforms and two vectors of scales: QuIP#'s and QTIP's.

W = diag(SV) Q_R Ŵ Q_Cᵀ diag(SU)
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from vqllm.foreign import sloane
from vqllm.foreign.base import BLOCK_WEIGHTS, ForeignFormat, Rows, Shape, Stored


@dataclass(frozen=True)
class Rotation:
    """Q of one side, in blocks of `block` features; the order of its core."""

    core: int
    block: int

    def apply(self, v: Tensor) -> Tensor:
        """Q v along the last axis."""
        return sloane.transform(v, self.core, self.block)


@dataclass(frozen=True)
class Around:
    """What stands around Ŵ: `inputs` and `outputs` are Q_C and Q_R, `su_C` and `sv_R` float32."""

    inputs: Rotation
    outputs: Rotation
    su_C: Tensor
    sv_R: Tensor


class RotatedFormat(ForeignFormat):
    """All rows of a weight are decoded at a time, as the transform of the outputs mixes them."""

    @abstractmethod
    def inner_rows(self, module: Stored, shape: Shape) -> Rows:
        """A decoder of Ŵ, in blocks of a multiple of `shape.unit` rows."""

    @abstractmethod
    def around(self, module: Stored, shape: Shape) -> Around:
        """What stands around it."""

    def rows(self, module: Stored, shape: Shape) -> Rows:
        weight = self._whole(module, shape)
        return lambda start, stop: weight[start:stop]

    def _whole(self, module: Stored, shape: Shape) -> Tensor:
        inner, around = self.inner_rows(module, shape), self.around(module, shape)
        weight = torch.empty(shape.rows, shape.cols)
        step = max(BLOCK_WEIGHTS // shape.cols // shape.unit, 1) * shape.unit
        for start in range(0, shape.rows, step):
            stop = min(start + step, shape.rows)
            weight[start:stop] = around.inputs.apply(inner(start, stop)) * around.su_C
        step = max(BLOCK_WEIGHTS // shape.rows, 1)
        for start in range(0, shape.cols, step):
            part = weight[:, start : start + step]
            part.copy_(around.outputs.apply(part.T.contiguous()).T * around.sv_R[:, None])
        return weight


def rotation(module: Stored, name: str, features: int, blocks: int = 1) -> Rotation:
    """The transform of a side, whose scales are `name`, in so many blocks. ModelError where these
    tools have none of its size."""
    core = sloane.core_of(features)
    block = features // blocks
    if core is None or features % blocks or block % core:
        cores = ", ".join(map(str, sorted(sloane.CORES)))
        whole = f" in {blocks} blocks" if blocks > 1 else ""
        module.refuse(name, f"a power of two, or one times {cores}, of features{whole}")
    return Rotation(core, block)
