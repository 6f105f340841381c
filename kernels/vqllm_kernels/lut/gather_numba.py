"""Look-ups one by one, compiled by numba, for any processor. No lock is held."""

import numba
import numpy as np
from numpy.typing import NDArray


@numba.njit(nogil=True, cache=True, fastmath={"contract", "nnan", "ninf", "nsz"})
def add(
    sums_GE: NDArray[np.float32],
    codes_GR: NDArray[np.uint8],
    first_part: int,
    step: int,
    num_pieces: int,
    out_PR: NDArray[np.float32],
) -> None:
    """out[p, r] = Σ of sums[g, codes[g, r]] over part p of the pieces g, for every step-th part."""
    parts = len(out_PR)
    for p in range(first_part, parts, step):
        out_R = out_PR[p]
        out_R[:] = 0
        g, last = num_pieces * p // parts, num_pieces * (p + 1) // parts
        # Four pieces a pass: the sums are loaded and stored once for four look-ups.
        while g + 4 <= last:
            a, b, c, d = sums_GE[g], sums_GE[g + 1], sums_GE[g + 2], sums_GE[g + 3]
            i, j, k, m = codes_GR[g], codes_GR[g + 1], codes_GR[g + 2], codes_GR[g + 3]
            for r in range(len(out_R)):
                out_R[r] += (a[i[r]] + b[j[r]]) + (c[k[r]] + d[m[r]])
            g += 4
        while g < last:
            a, i = sums_GE[g], codes_GR[g]
            for r in range(len(out_R)):
                out_R[r] += a[i[r]]
            g += 1
