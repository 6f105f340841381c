"""The transforms of one side of a linear: factors, a Hadamard transform, factors again."""

from collections.abc import Sequence
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
        numbers = self._numbers.ctypes.data
        _few_rows(len(v_NC), v_NC.data_ptr(), numbers, is_bfloat16, out.data_ptr())
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


@njit()
def _few_rows(num_rows: int, v: int, numbers: int, is_bfloat16: bool, out: int) -> None:
    chain = numba.carray(memory.pointer(numbers), (NUM_CHAIN,), np.int64)
    v_NC = numba.carray(memory.pointer(v), (num_rows, chain[0]), np.float32)
    spare = np.empty(chain[0], np.float32)
    for n in range(num_rows):
        through(v_NC[n], chain, spare)
    write(v_NC, is_bfloat16, out)


@njit()
def through(v: NDArray[np.float32], numbers: NDArray[np.int64], spare: NDArray[np.float32]) -> None:
    """A chain of one row, in place."""
    size, before, twos, m, core, after, transpose = numbers
    v *= numba.carray(memory.pointer(before), (size,), np.float32)
    if twos * m > 1:
        H = numba.carray(memory.pointer(core), (m, m), np.float32)
        hadamard.transform(v, twos, H, transpose != 0, spare)
        v *= numba.carray(memory.pointer(after), (size,), np.float32)


@njit()
def read(x: int, is_bfloat16: bool, out: NDArray[np.float32]) -> None:
    if is_bfloat16:
        bits = numba.carray(memory.pointer(x), out.shape, np.uint16)
        raw = out.view(np.uint32)
        for n in range(out.shape[0]):
            for c in range(out.shape[1]):
                raw[n, c] = np.uint32(bits[n, c]) << np.uint32(16)
    else:
        out[:] = numba.carray(memory.pointer(x), out.shape, np.float32)


@njit()
def write(y: NDArray[np.float32], is_bfloat16: bool, out: int) -> None:
    if not is_bfloat16:
        numba.carray(memory.pointer(out), y.shape, np.float32)[:] = y
        return
    bits = numba.carray(memory.pointer(out), y.shape, np.uint16)
    raw = y.view(np.uint32)
    for n in range(y.shape[0]):
        for c in range(y.shape[1]):
            bits[n, c] = bfloat16(raw[n, c])
