"""What every kernel does with the sums of integers of a row of tiles."""

import numpy as np
from numpy.typing import NDArray

from vqllm_kernels.compiled import njit


@njit()
def add_sums(sums: NDArray[np.int32], is_bytes: bool, totals: NDArray[np.int64]) -> None:
    """Add sums [parts, tile rows] to totals [rows of x, tile rows].

    With bytes the parts of a row of x are those of its high bytes, then of its low ones.
    """
    rows, tile_rows = totals.shape
    for n in range(rows):
        if is_bytes:
            for r in range(tile_rows):
                totals[n, r] += (np.int64(sums[2 * n, r]) << 8) + sums[2 * n + 1, r]
        else:
            for r in range(tile_rows):
                totals[n, r] += sums[n, r]


@njit()
def add_lanes(sums: NDArray[np.int32], totals: NDArray[np.int64]) -> None:
    """Add sums [rows of x, tile rows, lanes] to totals [rows of x, tile rows]."""
    rows, tile_rows, lanes = sums.shape
    for n in range(rows):
        for r in range(tile_rows):
            for lane in range(lanes):
                totals[n, r] += sums[n, r, lane]


@njit()
def scale_sums(
    totals: NDArray[np.int64], of_row: NDArray[np.float64], first: int, y: NDArray[np.float32]
) -> None:
    """y from row `first` of W on: totals less of_row[1], times of_row[0], of each row of x."""
    rows, tile_rows = totals.shape
    for n in range(rows):
        for r in range(tile_rows):
            y[n, first + r] = (totals[n, r] - of_row[1, n]) * of_row[0, n]


@njit()
def bfloat16(bits: np.uint32) -> np.uint32:
    """The 16 bits of float32 bits, uint32: to the nearest, and to even where it is in the middle,
    as torch rounds. What is not finite stays so if its lower 16 bits are 0."""
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
