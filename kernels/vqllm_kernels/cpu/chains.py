"""The transforms of one side of a linear: factors, a Hadamard transform, factors again."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqllm_kernels.compiled import entry, njit, numba
from vqllm_kernels.cpu import hadamard, memory, threads
from vqllm_kernels.cpu.sums import bfloat16
from vqllm_kernels.kernels import Tensors
from vqllm_kernels.transforms import HadamardSpec, ScaleSpec, TransformSpec

Stage = tuple[TransformSpec, Tensors]

NUM_CHAIN = 7
"""int64 of `Chain.numbers`."""


@dataclass(frozen=True)
class Chain:
    """Factors, a Hadamard transform and factors again, of the features of one side."""

    before: NDArray[np.float32]
    order: hadamard.Order
    after: NDArray[np.float32]
    transpose: bool

    def numbers(self) -> list[int]:
        """What `_through` is given."""
        return [
            len(self.before),
            self.before.ctypes.data,
            self.order.twos,
            len(self.order.core),
            self.order.core.ctypes.data,
            self.after.ctypes.data,
            int(self.transpose),
        ]

    def rows(self, x_NC: Tensor) -> Tensor:
        """Many rows of bfloat16 [N, size], by all threads."""
        out = torch.empty_like(x_NC)
        numbers = np.array(
            [threads.count(), len(x_NC), x_NC.data_ptr(), out.data_ptr(), *self.numbers()],
            np.int64,
        )
        threads.start(_rows(), numbers.ctypes.data, int(numbers[0]))
        return out

    def few_rows(self, v_NC: Tensor, dtype: torch.dtype) -> Tensor:
        """A few rows of float32 [N, size], which are overwritten, on one thread, in `dtype`."""
        v_NC = v_NC.contiguous()
        is_bfloat16 = dtype == torch.bfloat16
        out = torch.empty_like(v_NC, dtype=dtype if is_bfloat16 else torch.float32)
        chain = self._numbers.ctypes.data
        numbers = array("q", (len(v_NC), v_NC.data_ptr(), chain, is_bfloat16, out.data_ptr()))
        _few_rows()(numbers.buffer_info()[0])
        return out.to(dtype)

    @cached_property
    def _numbers(self) -> NDArray[np.int64]:
        return np.array(self.numbers(), np.int64)


def chain(stages: Sequence[Stage], size: int, direction: str) -> Chain | str:
    """The transforms of one side in the order in which they are applied, or why they are others.

    Args:
        direction: "input" or "output".
    """
    before, after = (torch.ones(size, dtype=torch.float32) for _ in range(2))
    order, transpose = hadamard.order(1), direction == "output"
    for spec, tensors in stages:
        if isinstance(spec, ScaleSpec):
            factor = spec.scale(tensors).float()
        elif isinstance(spec, HadamardSpec) and order.size == 1:
            order = hadamard.order(spec.order)
            factor = spec._signs(tensors, torch.float32)
            if transpose:
                before = before * order.norm
            else:
                factor = factor * order.norm
        else:
            return f"{spec.kind} transforms beside what scales and one Hadamard transform do"
        # The signs come before a transform of the input, and behind one of the output.
        is_first = order.size == 1 or (isinstance(spec, HadamardSpec) and not transpose)
        if is_first:
            before = before * factor
        else:
            after = after * factor
    arrays = (np.ascontiguousarray(v.numpy(), dtype=np.float32) for v in (before, after))
    return Chain(next(arrays), order, next(arrays), transpose)


@cache
def _rows() -> int:
    """The address of a C function of the numbers of `Chain.rows`."""
    threads.available()

    def transform(pointer: Any) -> None:
        a = numba.carray(pointer, (4 + NUM_CHAIN,))
        num_threads, num_rows, size = a[0], a[1], a[4]
        me = threads.number() if num_threads > 1 else 0
        v = np.empty((1, size), np.float32)
        spare = np.empty(size, np.float32)
        for n in range(num_rows * me // num_threads, num_rows * (me + 1) // num_threads):
            read(a[2] + n * size * 2, True, v)
            through(v[0], a[4:], spare)
            write(v, True, a[3] + n * size * 2)

    return entry(transform)


@cache
def _few_rows() -> Callable[[int], None]:
    """A C function of the numbers of `Chain.few_rows`."""
    threads.available()

    def transform(pointer: Any) -> None:
        a = numba.carray(pointer, (5,))
        chain = numba.carray(memory.pointer(a[2]), (NUM_CHAIN,), np.int64)
        v_NC = numba.carray(memory.pointer(a[1]), (a[0], chain[0]), np.float32)
        spare = np.empty(chain[0], np.float32)
        for n in range(len(v_NC)):
            through(v_NC[n], chain, spare)
        write(v_NC, a[3] != 0, a[4])

    return memory.C_FUNCTION(entry(transform))


@njit()
def through(v: NDArray[np.float32], numbers: NDArray[np.int64], spare: NDArray[np.float32]) -> None:
    """A chain of one row, in place."""
    size, before, twos, m, core, after, transpose = numbers
    _times(v, numba.carray(memory.pointer(before), (size,), np.float32))
    if twos * m > 1:
        H = numba.carray(memory.pointer(core), (m, m), np.float32)
        hadamard.transform(v, twos, H, transpose != 0, spare)
        _times(v, numba.carray(memory.pointer(after), (size,), np.float32))


# Loops in place of operations on whole arrays: what numba calls for those, should their shapes
# differ, is not loaded without numba (`machine_code`).


@njit()
def _times(v: NDArray[np.float32], factors: NDArray[np.float32]) -> None:
    for i in range(len(v)):
        v[i] *= factors[i]


@njit()
def read(x: int, is_bfloat16: bool, out: NDArray[np.float32]) -> None:
    rows, cols = out.shape
    if is_bfloat16:
        bits = numba.carray(memory.pointer(x), (rows, cols), np.uint16)
        for n in range(rows):
            raw = numba.carray(memory.pointer(out[n:].ctypes.data), (cols,), np.uint32)
            for c in range(cols):
                raw[c] = np.uint32(bits[n, c]) << np.uint32(16)
    else:
        values = numba.carray(memory.pointer(x), (rows, cols), np.float32)
        for n in range(rows):
            for c in range(cols):
                out[n, c] = values[n, c]


@njit()
def write(y: NDArray[np.float32], is_bfloat16: bool, out: int) -> None:
    rows, cols = y.shape
    if is_bfloat16:
        bits = numba.carray(memory.pointer(out), (rows, cols), np.uint16)
        for n in range(rows):
            raw = numba.carray(memory.pointer(y[n:].ctypes.data), (cols,), np.uint32)
            for c in range(cols):
                bits[n, c] = bfloat16(raw[c])
    else:
        values = numba.carray(memory.pointer(out), (rows, cols), np.float32)
        for n in range(rows):
            for c in range(cols):
                values[n, c] = y[n, c]
