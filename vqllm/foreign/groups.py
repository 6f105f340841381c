"""Integers with a scale and a zero point for each group of columns: what GPTQ, AWQ and
compressed-tensors have in common, however they store it.

    W[r, c] = scale[r, g(c)] · (q[r, c] − zero[r, g(c)])
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vqllm.foreign.base import BLOCK_WEIGHTS, CannotHoldError, Packed, Rows
from vqllm_kernels.bitpack import pack_bits
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.uniform.spec import UniformSpec


@dataclass(frozen=True)
class Grouped:
    """A weight [R, C] of such integers, with G groups of columns."""

    bits: int
    codes: Callable[[int, int], Tensor]
    """gives the q of rows `start` to `stop`, int32 [stop - start, C], in 0..2^bits - 1"""
    scale_RG: Tensor
    """float, as stored"""
    zero_RG: Tensor
    """int32, in the same range as the codes"""
    group_C: Tensor
    """int64, the group of each column"""

    def rows(self) -> Rows:
        """Decodes it."""

        def decode(start: int, stop: int) -> Tensor:
            scale = self.scale_RG[start:stop].float()[:, self.group_C]
            zero = self.zero_RG[start:stop][:, self.group_C]
            return scale * (self.codes(start, stop) - zero)

        return decode

    def pack(self, group: int | None) -> Packed:
        """As uniform-v1 with groups of so many columns (None: the whole row).

        Raises:
            CannotHoldError: columns of a group do not stand together, or scales are no float16.
        """
        rows, cols = len(self.scale_RG), len(self.group_C)
        if not torch.equal(self.group_C, torch.arange(cols) // (group or cols)):
            raise CannotHoldError(
                "its columns are in groups by the order in which they were quantized (desc_act), "
                "while groups of uniform-v1 are columns that stand together"
            )
        scale = self.scale_RG.half()
        if not torch.equal(scale.double(), self.scale_RG.double()):
            raise CannotHoldError(
                f"a scale is {self.scale_RG.dtype} and has no equal in float16, in which "
                "uniform-v1 stores scales"
            )
        if (top := int(self.zero_RG.max())) >= 1 << self.bits or int(self.zero_RG.min()) < 0:
            raise CannotHoldError(
                f"a zero point is {top}, and uniform-v1 has 0..{(1 << self.bits) - 1}"
            )

        def make() -> dict[str, Tensor]:
            step = max(BLOCK_WEIGHTS // cols // 8, 1) * 8
            codes = [
                pack_bits(self.codes(start, min(start + step, rows)), self.bits)
                for start in range(0, rows, step)
            ]
            return {
                "codes": torch.cat(codes),
                "scale": scale.contiguous(),
                "zero": self.zero_RG.to(torch.uint8).contiguous(),
            }

        format = UniformSpec(bits=self.bits, group=group)
        return LinearSpec(rows=rows, cols=cols, format=format), make


def regular(cols: int, group: int | None) -> Tensor:
    """The group of each column, where groups are so many columns that stand together."""
    return torch.arange(cols) // (group or cols)


def as_bytes(words: Tensor) -> Tensor:
    """int32 words [..., n] as bytes [..., 4 n], lowest first: packed symbols without gaps then
    have the bit order of `vqllm_kernels.bitpack`."""
    return words.contiguous().view(torch.uint8)
