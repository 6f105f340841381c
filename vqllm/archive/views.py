"""The bytes of a tensor as streams of symbols, and back.

Which symbols a tensor is made of is not asked of its format: several views are tried, and the one
that takes the fewest bytes is stored. Every view is exact, or does not apply.

    packed    rows of codes of `width` bits, least significant bit first, padded to whole bytes with
              zeros: codes of scalars and of codebooks
    split     the upper 16 − width and the lower `width` bits of numbers of two bytes, as two
              streams: sign and exponent of float16 or bfloat16 apart from the lower mantissa
    planes    the first, second, ... byte of every number of `width` bytes
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Bytes = np.ndarray
"""uint8 [R, B]: the rows of a tensor, its other axes taken together"""
Symbols = np.ndarray
"""uint16 [R, n]"""


@dataclass(frozen=True)
class View:
    """One of these ways, with its parameter."""

    kind: Literal["packed", "split", "planes"]
    width: int

    def symbols(self, data: Bytes) -> list[Symbols] | None:
        """The streams; None where the view is not exact for these bytes."""
        if self.kind == "packed":
            codes = _unpacked(data, self.width)
            return None if codes is None else [codes]
        if self.kind == "split":
            numbers = np.ascontiguousarray(data).view("<u2")
            return [numbers >> self.width, numbers & ((1 << self.width) - 1)]
        return [data[:, i :: self.width].astype(np.uint16) for i in range(self.width)]

    def bytes(self, streams: list[Symbols], num_bytes: int) -> Bytes:
        """What `symbols` was given; `num_bytes` of a row."""
        if self.kind == "packed":
            return _packed(streams[0], self.width, num_bytes)
        if self.kind == "split":
            numbers = (streams[0] << self.width) | streams[1]
            return numbers.astype("<u2").view(np.uint8)
        data = np.empty((len(streams[0]), num_bytes), np.uint8)
        for i, plane in enumerate(streams):
            data[:, i :: self.width] = plane
        return data

    def num_symbols(self, num_bytes: int) -> list[int]:
        """Symbols of a row of each stream."""
        if self.kind == "packed":
            return [8 * num_bytes // self.width]
        if self.kind == "split":
            return [num_bytes // 2] * 2
        return [num_bytes // self.width] * self.width


def views_of(item_bytes: int, is_float: bool) -> list[View]:
    """The views that are tried for a tensor.

    Args:
        item_bytes: of a number as the file declares it.
        is_float: whether numbers are floats.
    """
    views = [View("planes", item_bytes)]
    if is_float and item_bytes == 2:
        views += [View("split", width) for width in (6, 7, 8, 10)]
    if not is_float and item_bytes < 4:
        # Codes of eight bits are the planes of one byte.
        views += [View("packed", width) for width in (1, 2, 3, 4, 5, 6, 7, 10, 12, 14)]
    return views


def _unpacked(data: Bytes, width: int) -> Symbols | None:
    """Codes uint16 [R, n], as many as fit in a row; None where the bits left over are not zero."""
    rows, num_bytes = data.shape
    num = 8 * num_bytes // width
    bits = np.unpackbits(data, axis=1, bitorder="little")
    if bits[:, num * width :].any():
        return None
    codes = np.zeros((rows, num), np.uint16)
    for i in range(width):
        codes |= bits[:, i : num * width : width].astype(np.uint16) << i
    return codes


def _packed(codes: Symbols, width: int, num_bytes: int) -> Bytes:
    rows, num = codes.shape
    bits = np.zeros((rows, 8 * num_bytes), np.uint8)
    for i in range(width):
        bits[:, i : num * width : width] = (codes >> i) & 1
    return np.packbits(bits, axis=1, bitorder="little")
