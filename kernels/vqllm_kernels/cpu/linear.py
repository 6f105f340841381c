"""A whole packed linear, or several of one input, as one call of compiled code.

    x  ── scales, Hadamard ──▶  x'  ── integers, product ──▶  y'  ── Hadamard, scales ──▶  y

What does not change from call to call is written down once, as addresses and sizes: `Linears`.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqllm_kernels.compiled import entry, njit, numba, said_if_long
from vqllm_kernels.cpu import activations, chains, memory, panels, threads
from vqllm_kernels.cpu.activations import MAX_ROWS, NUM_ARGUMENTS, Operand
from vqllm_kernels.cpu.chains import NUM_CHAIN, Chain
from vqllm_kernels.cpu.parts import Part

ROWS = (1, 2, 4, 8, MAX_ROWS)
"""Rows of x that kernels are compiled for; a call takes the first that holds it."""
PARALLEL_WEIGHTS = 1 << 18
"""Weights of a product from which on more than one thread pays: they take 10 us on one."""


@dataclass(frozen=True)
class Member:
    """A linear of `Linears`."""

    rows: int
    cols: int
    parts: Sequence[Part]
    """What is added, in this order."""
    output: Chain


@dataclass
class Linears:
    """Linears of one input."""

    input: Chain
    members: Sequence[Member]
    _plans: dict[int, "_Plan"] = field(default_factory=dict)
    """By rows of x."""

    def __call__(self, x: Tensor) -> list[Tensor] | None:
        """y of each, [..., rows] in the dtype of x; None if x is not finite.

        Args:
            x: bfloat16, float16 or float32 [..., cols], with a row at least.
        """
        x = x.contiguous()
        if x.dtype == torch.float16:
            ys = self(x.float())
            return None if ys is None else [y.to(x.dtype) for y in ys]
        *outer, cols = x.shape
        num_rows = x.numel() // cols
        if num_rows > MAX_ROWS:
            return self._many(x)
        plan = self._plans.get(num_rows)
        if plan is None:
            plan = self._plans[num_rows] = self._plan(num_rows)
        ys = [x.new_empty((*outer, member.rows)) for member in self.members]
        numbers = np.array(
            [
                x.data_ptr(),
                num_rows,
                x.dtype == torch.bfloat16,
                threads.count(),
                *plan.numbers,
                *(y.data_ptr() for y in ys),
            ],
            np.int64,
        )
        _entry()(numbers.ctypes.data)
        return ys if numbers[0] else None

    @property
    def nbytes(self) -> int:
        """Of the factors, which are kept beside the packed tensors."""
        chains = [self.input, *(member.output for member in self.members)]
        return sum(chain.before.nbytes + chain.after.nbytes for chain in chains)

    def _plan(self, num_rows: int) -> "_Plan":
        rows = next(r for r in ROWS if num_rows <= r)
        same = next((plan for plan in self._plans.values() if plan.rows == rows), None)
        if same is not None:
            return same
        with said_if_long():
            return _Plan.of(self, rows)

    def _many(self, x: Tensor) -> list[Tensor] | None:
        x_NC = x.view(-1, x.shape[-1])
        if x.dtype == torch.float32:  # panels are bfloat16, which has fewer digits
            pieces = [self(piece) for piece in x_NC.split(MAX_ROWS)]
            if any(piece is None for piece in pieces):
                return None
            return [torch.cat(ys).view(*x.shape[:-1], -1) for ys in zip(*pieces, strict=True)]
        x_NC = self.input.rows(x_NC)
        return [
            member.output.rows(panels.multiply(x_NC, member.parts, member.rows)).view(
                *x.shape[:-1], member.rows
            )
            for member in self.members
        ]


@dataclass(frozen=True)
class _Plan:
    """What `_multiply` is given besides x and y."""

    rows: int
    """Rows of x that its kernels are compiled for."""
    input: NDArray[np.int64]
    operands: NDArray[np.int64]
    constants: NDArray[np.float64]
    parts: NDArray[np.int64]
    scales: NDArray[np.float64]

    @property
    def numbers(self) -> list[int]:
        arrays = self.input, self.operands, self.constants, self.parts, self.scales
        sizes = [self.rows, len(self.operands), len(self.parts)]
        return [*sizes, *(own.ctypes.data for own in arrays)]

    @classmethod
    def of(cls, linears: Linears, rows: int) -> "_Plan":
        operands: list[Operand] = []
        every, scales = [], []
        for number, member in enumerate(linears.members):
            for part in member.parts:
                product = part.product(rows)
                if product.operand not in operands:
                    operands.append(product.operand)
                tile_rows, tile_cols = part.tile
                every.append(
                    [
                        number,
                        operands.index(product.operand),
                        product.address,
                        part.codes.data_ptr(),
                        -(-member.rows // tile_rows),
                        -(-member.cols // tile_cols),
                        tile_rows,
                        tile_cols,
                        member.rows,
                        member.cols,
                        part is member.parts[-1],
                        0 if product.table is None else product.table.data_ptr(),
                        *member.output.numbers(),
                    ]
                )
                scales.append(part.scale)
        return cls(
            rows,
            np.array(linears.input.numbers(), np.int64),
            np.array(
                [[o.parts, o.step_weights, o.is_bytes, o.in_planes] for o in operands],
                np.int64,
            ),
            np.array([[*o.factors, *o.offsets] for o in operands], np.float64),
            np.array(every, np.int64),
            np.array(scales, np.float64),
        )


@cache
def _entry() -> Callable[[int], None]:
    threads.available()

    def multiply(pointer: Any) -> None:
        a = numba.carray(pointer, (13,))
        n, m = a[5], a[6]
        a[0] = _multiply(
            a[0],
            a[1],
            a[2] != 0,
            a[3],
            a[4],
            numba.carray(memory.pointer(a[7]), (NUM_CHAIN,), np.int64),
            numba.carray(memory.pointer(a[8]), (n, 4), np.int64),
            numba.carray(memory.pointer(a[9]), (n, 4), np.float64),
            numba.carray(memory.pointer(a[10]), (m, 12 + NUM_CHAIN), np.int64),
            numba.carray(memory.pointer(a[11]), (m,), np.float64),
            numba.carray(pointer, (12 + m,))[12:],
        )

    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(entry(multiply))


@njit()
def _multiply(
    x: int,
    num_rows: int,
    is_bfloat16: bool,
    num_threads: int,
    rows: int,
    input: NDArray[np.int64],
    operands: NDArray[np.int64],
    constants: NDArray[np.float64],
    parts: NDArray[np.int64],
    scales: NDArray[np.float64],
    ys: NDArray[np.int64],
) -> bool:
    """Fills the y at the addresses `ys`. Returns whether x was finite."""
    cols = input[0]
    x_NC = np.empty((num_rows, cols), np.float32)
    chains.read(x, is_bfloat16, x_NC)
    spare = np.empty(max(cols, parts[:, 8].max()), np.float32)
    for n in range(num_rows):
        chains.through(x_NC[n], input, spare)
    num_operands = len(operands)
    # x is padded to whole tiles of every part.
    padded = cols
    for i in range(len(parts)):
        padded = max(padded, parts[i, 5] * parts[i, 7])
    words = np.empty((num_operands, operands[:, 0].max() * padded), np.int32)
    of_row = np.zeros((num_operands, 2, rows), np.float64)
    for k in range(num_operands):
        o = operands[k]
        is_finite = activations.round_rows(
            x_NC,
            constants[k, :2].astype(np.float32),
            constants[k, 2:],
            o[1],
            o[2] != 0,
            o[3] != 0,
            words[k, : o[0] * (padded // o[1])].reshape(o[0], padded // o[1]),
            of_row[k, 0],
            of_row[k, 1],
        )
        if not is_finite:
            return False
    arguments = np.empty(NUM_ARGUMENTS, np.int64)
    own = np.empty((2, rows), np.float64)
    sums = np.empty((rows, parts[:, 8].max()), np.float32)
    for i in range(len(parts)):
        p = parts[i]
        row_tiles, num_rows_W = p[4], p[8]
        y = np.empty((rows, row_tiles * p[6]), np.float32)
        own[:] = of_row[p[1]]
        own[0] *= scales[i]
        used = num_threads if num_rows_W * p[9] * rows >= PARALLEL_WEIGHTS else 1
        used = min(used, row_tiles)
        arguments[:3] = used, row_tiles, p[5]
        arguments[3], arguments[4] = p[3], words[p[1]].ctypes.data
        arguments[5] = 4 * (padded // operands[p[1], 1])
        arguments[6], arguments[7], arguments[8] = y.ctypes.data, own.ctypes.data, p[11]
        arguments[9] = num_rows_W
        if used > 1:
            threads.run(p[2], arguments.ctypes.data, used)
        else:
            memory.call(p[2], arguments.ctypes.data)
        is_first = i == 0 or parts[i - 1, 0] != p[0]
        is_last = p[10] != 0
        if not (is_first and is_last):
            total = sums[:, :num_rows_W]
            if is_first:
                total[:] = y[:, :num_rows_W]
            else:
                total += y[:, :num_rows_W]
                y[:, :num_rows_W] = total
        if is_last:
            for n in range(num_rows):
                chains.through(y[n, :num_rows_W], p[12:], spare)
            chains.write(y[:num_rows, :num_rows_W], is_bfloat16, ys[p[0]])
    # Arrays whose addresses only are used live until they are named for the last time.
    return len(words) + len(arguments) + len(own) > 0
