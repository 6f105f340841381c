"""Rows of x as integers of 16 bits, in the order in which a kernel reads them.

x f ≈ s q with integers |q| ≤ 32512, f being what the format's values are divided by. The rounding
adds a relative error of about 3 · 10⁻⁵, a hundredth of what bfloat16 has. One row and several
get the same integers, as bytes or as words.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vqllm_kernels.compiled import njit

LARGEST = 32512
"""The largest magnitude of q: 127 · 256, so that both bytes of it are signed."""
MAX_ROWS = 16
"""Rows of x that a kernel takes."""


NUM_ARGUMENTS = 10
"""int64 that a kernel is given, in this order: threads, rows of tiles, tiles of a row, the address
of the codes, that of the operand and the bytes from one part of it to the next, the address of y,
float32 [rows, padded rows of W], that of float64 [2, rows], the factor of each row of x and what is
subtracted from its sums before, that of what the code looks up, or 0, and the rows of W."""
NUM_PANEL_ARGUMENTS = 10
"""int64 that a kernel that decodes is given, in this order: threads, the first row of tiles and the
one after the last, tiles of a row, then the addresses of the codes and of bfloat16 [padded columns,
..], the bytes from one column to the next, the address of four numbers of the format, that of what
the code looks up, or 0, and the rows of W."""


@dataclass(frozen=True)
class Operand:
    """How a kernel wants x: int32 [parts, padded columns / step_weights]."""

    step_weights: int
    """Columns of an int32, 1, 2 or 4: they repeat where there are fewer than it holds."""
    is_bytes: bool
    """The high and the low bytes of each row are two parts; else words of 16 bits are one."""
    rows: int
    """Rows of x that the kernel is compiled for."""
    factors: tuple[float, float]
    """f, for even and for odd columns."""
    offsets: tuple[float, float]
    """What the kernel's values are too large by, before f, for even and for odd columns."""
    plane_columns: int = 1
    """With n of them, of 8 times n columns the first of each n come first, then the second of each,
    and so on."""

    @property
    def parts(self) -> int:
        return 2 * self.rows if self.is_bytes else self.rows


@njit()
def round_rows(
    x_NC: NDArray[np.float32],
    factors: NDArray[np.float32],
    offsets: NDArray[np.float64],
    step_weights: int,
    is_bytes: bool,
    plane_columns: int,
    out_PW: NDArray[np.int32],
    step_N: NDArray[np.float64],
    offset_N: NDArray[np.float64],
) -> bool:
    """Fills `out_PW` as `Operand` says, `step_N` with s, and `offset_N` with Σ q · offset.

    Returns:
        Whether all of x is finite. If it is not, the contents mean nothing.
    """
    num_rows = len(x_NC)
    q = np.zeros(out_PW.shape[1] * step_weights, np.int32)
    sums = np.empty(2, np.int64)
    for n in range(num_rows):
        q[x_NC.shape[1] :] = 0
        is_finite, step_N[n] = _round(x_NC[n], factors, q, sums)
        if not is_finite:
            return False
        offset_N[n] = sums[0] * offsets[0] + sums[1] * offsets[1]
        if plane_columns > 1:
            _transpose(q, plane_columns)
        if is_bytes:
            if step_weights == 1:
                _bytes_alone(q, out_PW[2 * n], out_PW[2 * n + 1])
            elif step_weights == 2:
                _bytes_in_pairs(q, out_PW[2 * n], out_PW[2 * n + 1])
            else:
                _bytes_in_fours(q, out_PW[2 * n], out_PW[2 * n + 1])
        elif step_weights == 1:
            _words_alone(q, out_PW[n])
        else:
            _words_in_pairs(q, out_PW[n])
    out_PW[num_rows * (2 if is_bytes else 1) :] = 0
    return True


_MAGIC = np.float32(1.5 * (1 << 23))
"""What is added to a number below 2^22 to have it rounded, to even, in the lowest bits."""
_MAGIC_BITS = np.int32(_MAGIC.view(np.int32))
_INFINITE = np.int32(0x7F800000)
_TINY = np.float32(1e-33)


@njit()
def _round(
    x: NDArray[np.float32],
    factors: NDArray[np.float32],
    q: NDArray[np.int32],
    sums: NDArray[np.int64],
) -> tuple[bool, float]:
    """Fills q, and the sums of its even and odd columns; returns whether x is finite, and s."""
    cols = len(x)
    even, odd = factors[0], factors[1]
    scaled = np.empty(cols, np.float32)
    for i in range(cols // 2):
        scaled[2 * i] = x[2 * i] * even
        scaled[2 * i + 1] = x[2 * i + 1] * odd
    if cols % 2:
        scaled[cols - 1] = x[cols - 1] * even
    # As integers the magnitudes have the same order, and those that are not finite come last.
    bits = scaled.view(np.int32)
    top = np.int32(0)
    for c in range(cols):
        top = max(top, bits[c] & np.int32(0x7FFFFFFF))
    if top >= _INFINITE:
        return False, 0.0
    of_top = np.empty(1, np.int32)  # no list, which is not loaded without numba
    of_top[0] = top
    largest = of_top.view(np.float32)[0]
    per_unit = np.float32(LARGEST) / largest if largest > _TINY else np.float32(0)
    for c in range(cols):
        scaled[c] = scaled[c] * per_unit + _MAGIC
    for c in range(cols):
        q[c] = bits[c] - _MAGIC_BITS
    evens = odds = np.int64(0)
    for i in range(cols // 2):
        evens += q[2 * i]
        odds += q[2 * i + 1]
    if cols % 2:
        evens += q[cols - 1]
    sums[0], sums[1] = evens, odds
    return True, np.float64(largest) / LARGEST


@njit()
def _transpose(q: NDArray[np.int32], columns: int) -> None:
    """Every 8 times so many columns as a matrix of 8 rows, the other way round."""
    own = np.empty(8 * columns, np.int32)
    for start in range(0, len(q) - 8 * columns + 1, 8 * columns):
        for i in range(8 * columns):
            own[i] = q[start + i]
        for i in range(columns):
            for j in range(8):
                q[start + 8 * i + j] = own[columns * j + i]


@njit()
def _bytes_alone(q: NDArray[np.int32], high: NDArray[np.int32], low: NDArray[np.int32]) -> None:
    """A column in all four bytes."""
    for i in range(len(q)):
        upper = (q[i] + np.int32(128)) >> np.int32(8)
        high[i] = (upper & np.int32(255)) * np.int32(0x01010101)
        low[i] = (q[i] & np.int32(255)) * np.int32(0x01010101)


@njit()
def _bytes_in_pairs(q: NDArray[np.int32], high: NDArray[np.int32], low: NDArray[np.int32]) -> None:
    """Two columns, twice each."""
    for i in range(len(q) // 2):
        a, b = q[2 * i], q[2 * i + 1]
        upper_a, upper_b = (a + np.int32(128)) >> np.int32(8), (b + np.int32(128)) >> np.int32(8)
        both = (upper_a & np.int32(255)) | ((upper_b & np.int32(255)) << np.int32(16))
        high[i] = both * np.int32(0x0101)
        both = (a & np.int32(255)) | ((b & np.int32(255)) << np.int32(16))
        low[i] = both * np.int32(0x0101)


@njit()
def _bytes_in_fours(q: NDArray[np.int32], high: NDArray[np.int32], low: NDArray[np.int32]) -> None:
    """Four columns."""
    for i in range(len(q) // 4):
        upper = lower = np.int32(0)
        for k in range(4):
            v = q[4 * i + k]
            upper |= (((v + np.int32(128)) >> np.int32(8)) & np.int32(255)) << np.int32(8 * k)
            lower |= (v & np.int32(255)) << np.int32(8 * k)
        high[i], low[i] = upper, lower


@njit()
def _words_alone(q: NDArray[np.int32], out: NDArray[np.int32]) -> None:
    """A column in both words."""
    for i in range(len(q)):
        out[i] = (q[i] & np.int32(0xFFFF)) * np.int32(0x00010001)


@njit()
def _words_in_pairs(q: NDArray[np.int32], out: NDArray[np.int32]) -> None:
    """Two columns."""
    for i in range(len(q) // 2):
        out[i] = (q[2 * i] & np.int32(0xFFFF)) | (q[2 * i + 1] << np.int32(16))
