"""Formats e8p-v1 (2 bits a weight) and e81b-v1 (1 bit a weight); the bits are in `reference`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vqllm_kernels.cpu.kernels import PackedKernels
from vqllm_kernels.e8p import reference
from vqllm_kernels.formats import FormatSpec, register
from vqllm_kernels.kernels import Kernels, Kind
from vqllm_kernels.layout import TensorLayout

if TYPE_CHECKING:
    from vqllm_kernels.cpu.parts import Part


@register
@dataclass(frozen=True, kw_only=True)
class E8PSpec(FormatSpec):
    """Eight weights of a row in 16 bits: `codes` int16 (a bit pattern), one `scale`."""

    format_id: ClassVar[str] = "e8p-v1"

    @property
    def tile(self) -> tuple[int, int]:
        return (1, 8)

    def layout(self, rows: int, cols: int) -> dict[str, TensorLayout]:
        return {
            "codes": TensorLayout(self.grid(rows, cols), torch.int16, "codes", by_tile_row=True),
            "scale": TensorLayout((1,), torch.float32, "side"),
        }

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        return reference.decode(tensors, rows, cols)

    def kernels(self, kind: Kind) -> Kernels:
        if kind == "triton":
            from vqllm_kernels.e8p.kernels import E8PKernels

            return E8PKernels(is_e8p=True)
        if kind == "packed":
            return PackedKernels(spec=self, parts=self._parts)
        return super().kernels(kind)

    def _parts(self, tensors: dict[str, Tensor]) -> "list[Part]":
        from vqllm_kernels.cpu import e8p, instructions

        return [e8p.part(tensors, instructions.instructions())]


@register
@dataclass(frozen=True, kw_only=True)
class E81BSpec(FormatSpec):
    """Eight weights of a row in 8 bits: `codes` uint8, one `scale`."""

    format_id: ClassVar[str] = "e81b-v1"

    @property
    def tile(self) -> tuple[int, int]:
        return (1, 8)

    def layout(self, rows: int, cols: int) -> dict[str, TensorLayout]:
        return {
            "codes": TensorLayout(self.grid(rows, cols), torch.uint8, "codes", by_tile_row=True),
            "scale": TensorLayout((1,), torch.float32, "side"),
        }

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        return reference.decode_e81b(tensors, rows, cols)

    def kernels(self, kind: Kind) -> Kernels:
        if kind == "triton":
            from vqllm_kernels.e8p.kernels import E8PKernels

            return E8PKernels(is_e8p=False)
        if kind == "packed":
            return PackedKernels(spec=self, parts=self._parts)
        if kind == "lookup":
            from vqllm_kernels.lut.cpu import LookupKernels

            return LookupKernels(spec=self, index_bits=8, entries=self._entries)
        return super().kernels(kind)

    def _parts(self, tensors: dict[str, Tensor]) -> "list[Part]":
        from vqllm_kernels.cpu import codebooks, instructions

        own, scale = instructions.instructions(), float(tensors["scale"]) / 2
        return [codebooks.part(tensors["codes"], reference.e81b_table(), scale, own)]

    def _entries(self, tensors: dict[str, Tensor]) -> Tensor:
        """All 256 entries, float32 [256, 8], scaled."""
        every = torch.arange(256, dtype=torch.uint8)[:, None]
        return self.decode({**tensors, "codes": every}, 256, 8)
