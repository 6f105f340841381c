"""Exact storage accounting, derived from the tensors that are written."""

from collections.abc import Mapping
from dataclasses import dataclass

from vqllm_kernels.layout import TensorLayout


@dataclass(frozen=True)
class BitCount:
    """Bits of the stored tensors of one linear, split by what they hold.

    `codes` are the indices of the weights (padding to whole tiles and bytes included), `codebook`
    is learned tables, `side` is everything else that the linear needs: scales, signs,
    permutations. Units: bits.
    """

    codes: int = 0
    codebook: int = 0
    side: int = 0

    @property
    def total(self) -> int:
        return self.codes + self.codebook + self.side

    def __add__(self, other: "BitCount") -> "BitCount":
        return BitCount(
            self.codes + other.codes, self.codebook + other.codebook, self.side + other.side
        )


def count(layout: Mapping[str, TensorLayout]) -> BitCount:
    """The bits of a set of tensors described by their layout."""
    bits = {"codes": 0, "codebook": 0, "side": 0}
    for tensor in layout.values():
        bits[tensor.kind] += 8 * tensor.num_bytes
    return BitCount(**bits)
