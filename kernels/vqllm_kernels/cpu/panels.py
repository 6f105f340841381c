"""Many rows of x: W is decoded a panel at a time, into the cache, and torch multiplies.

A panel is some rows of W in bfloat16, a column behind the other, as torch's product takes its
second factor. It is decoded again at every call, by all threads, into memory that stays: fresh
memory costs about as much in faults as the decoding does (4096 x 4096 at 2 bits: 1.5 and 2 ms).
"""

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vqllm_kernels.cpu import threads
from vqllm_kernels.cpu.activations import NUM_PANEL_ARGUMENTS
from vqllm_kernels.cpu.parts import Part

PANEL_WEIGHTS = 1 << 21
"""Weights of a panel, 4 MB: with a fourth of it a product of 256 rows of x and 4096 x 4096 takes
1.24 times as long, because torch's product has less to share."""


def multiply(x_NC: Tensor, parts: Sequence[Part], rows: int) -> Tensor:
    """x Wᵀ, bfloat16 [N, rows], of the sum of parts.

    Args:
        x_NC: bfloat16 [N, cols].
    """
    y_NR = x_NC.new_empty(len(x_NC), rows)
    for number, part in enumerate(parts):
        _multiply(x_NC, part, rows, y_NR, is_first=number == 0)
    return y_NR


def _multiply(x_NC: Tensor, part: Part, rows: int, y_NR: Tensor, is_first: bool) -> None:
    tile_rows, tile_cols = part.tile
    cols = x_NC.shape[1]
    row_tiles, num_tiles = -(-rows // tile_rows), -(-cols // tile_cols)
    step = max(1, PANEL_WEIGHTS // (tile_rows * num_tiles * tile_cols))
    panel_CR = _memory(num_tiles * tile_cols, min(step, row_tiles) * tile_rows)
    numbers = np.array(part.panel_numbers, np.float32)
    arguments = np.empty(NUM_PANEL_ARGUMENTS, np.int64)
    used = threads.count()
    for first in range(0, row_tiles, step):
        stop = min(first + step, row_tiles)
        arguments[:] = (
            used,
            first,
            stop,
            num_tiles,
            part.codes.data_ptr(),
            panel_CR.data_ptr(),
            2 * panel_CR.shape[1],
            numbers.ctypes.data,
            0 if part.table is None else part.table.data_ptr(),
            rows,
        )
        threads.start(part.panel(), arguments.ctypes.data, used)
        start, end = first * tile_rows, min(stop * tile_rows, rows)
        W_CR = panel_CR[:cols, : end - start]
        if is_first:
            torch.mm(x_NC, W_CR, out=y_NR[:, start:end])
        else:
            y_NR[:, start:end].addmm_(x_NC, W_CR)


_of_thread = threading.local()


def _memory(rows: int, cols: int) -> Tensor:
    """bfloat16 [rows, cols] with any values, valid until this thread asks again."""
    kept = getattr(_of_thread, "memory", None)
    if kept is None or kept.numel() < rows * cols:
        with torch.inference_mode(False):
            kept = _of_thread.memory = torch.empty(rows * cols, dtype=torch.bfloat16)
    return kept[: rows * cols].view(rows, cols)
