"""Products with looked-up sums on a CPU, for codebooks of at most 256 entries along the columns.

With the inputs cut into pieces of d columns, one small product gives the inner product of every
entry with every piece, [pieces, 256]. A tile of W then costs one look-up and an addition, whatever
d is, and no weight is ever decoded. Where the processor can (AVX-512 VBMI), 64 codes are looked up
at once in registers (permute_numba.py); elsewhere one by one, along the codes of all rows for one
piece, whose 256 products stay in the first-level cache (gather_numba.py).

In registers 4096 x 4096 is 8 times as fast as torch's bfloat16 product at 1 bit (d = 8), and 2.5 to
5 times at 2 bits and more (kernels/bench/results/cpu.csv).

Source: the idea is that of AQLM's CPU kernel, arXiv 2401.06118, section 3.4.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vqllm_kernels.bitpack import unpack_bits
from vqllm_kernels.compilers import why_no_numba
from vqllm_kernels.kernels import Call, Operand, Tensors, as_tensor
from vqllm_kernels.reference import ReferenceKernels, sums

MAX_BITS = 8
PARTS = 8
"""Where codes are looked up one by one, the pieces of a large matrix are dealt out to so many sums,
which are added in their order: the result does not depend on the number of threads."""
LARGE = 1 << 23
"""Look-ups from which on threads pay there: 4096 x 4096 at d = 4 (2^22) takes 1.2 ms on one core
and 1.5 on two, a thread of Python's being slow to wake; 14336 x 4096 3.8 ms and 2.8 to 4.2. In
registers 14336 x 4096 takes 1.2 ms on one and 1.4 on two: one thread it is."""

REGISTER_COLUMNS = 512
"""Columns from which on products rounded to 24 bits are as exact as torch's float32: the relative
error is 2 · 10⁻⁷ whatever their number, that of torch grows with it (at 16 columns it is a third,
at 4096 three times as large)."""

_prepared = WeakTensorKeyDictionary()
"""Codes as stored -> (addresses and versions of what went in, codes by piece, entries)."""


@dataclass(frozen=True, kw_only=True)
class LookupKernels(ReferenceKernels):
    """Look-ups of one format: a code of `index_bits` bits for each piece of a row.

    The codes by piece, one byte each, are kept beside the stored ones for as long as those live.
    """

    index_bits: int
    entries: Callable[[Tensors], Tensor]
    """The entries of all codes in their order, float32 [2^index_bits, d], from stored tensors."""

    @property
    def takes_blocks(self) -> bool:
        # Nothing is decoded, and the codes that are kept belong to the whole matrix.
        return False

    def declines(self, call: Call) -> str | None:
        if problem := why_no_numba():
            return problem
        tile_rows = self.spec.tile[0]
        if tile_rows != 1 or self.index_bits > MAX_BITS:
            return (
                f"entries of {tile_rows} rows, {self.index_bits} bits; look-ups take one row and "
                f"at most {MAX_BITS} bits"
            )
        return None

    def matmuls(
        self,
        x: Operand,
        tensors: Sequence[Tensors],
        rows: Sequence[int],
        cols: int,
        dtype: torch.dtype,
        adds: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        x_NC = as_tensor(x)
        if len(x_NC) == 0:
            return [x_NC.new_empty(0, own, dtype=dtype) for own in rows]
        # Pieces of d columns, the last one filled up with zeros.
        x_NC = x_NC.to(torch.float32).contiguous()
        missing = -cols % self.spec.tile[1]
        padded = torch.nn.functional.pad(x_NC, (0, missing)) if missing else x_NC
        x_NGD = padded.view(len(x_NC), -1, self.spec.tile[1])
        ys = [
            self._matmul(x_NGD, own, num_rows, cols)
            for own, num_rows in zip(tensors, rows, strict=True)
        ]
        return sums(ys, adds, dtype)

    def _matmul(self, x_NGD: Tensor, tensors: Tensors, rows: int, cols: int) -> Tensor:
        codes, entries_DE = self._prepare(tensors, cols)
        return torch.stack([_product(x_GD, entries_DE, codes, rows) for x_GD in x_NGD.unbind()])

    def _prepare(self, tensors: Tensors, cols: int) -> tuple[Tensor, Tensor]:
        """Codes as they are read, uint8 [pieces, rows] or, for registers, [pieces · padded rows],
        and all entries of the table, float32 [d, 2^bits or more]."""
        codes = tensors["codes"]
        key = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors.values()]
        kept = _prepared.get(codes)
        if kept is None or kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                index_RG = unpack_bits(codes, self.index_bits, -(-cols // self.spec.tile[1]))
                codes_GR = index_RG.to(torch.uint8).T.contiguous()
                entries_ED = self.entries(tensors)
                if _in_registers(cols):
                    from vqllm_kernels.lut.permute_numba import arrange

                    missing = max(128 - len(entries_ED), 0)
                    entries_ED = torch.nn.functional.pad(entries_ED, (0, 0, 0, missing))
                    codes_GR = arrange(codes_GR)
                kept = (key, codes_GR, entries_ED.T.contiguous())
            _prepared[codes] = kept
        return kept[1], kept[2]


def fewest_weights(cols: int) -> int:
    """Weights of a linear from which on its look-ups are faster than torch's bfloat16 product, of
    whatever kind: 2048 x 1024 takes 50 to 97 us in registers, torch 145 (1024 x 1024: 48 to 81,
    torch 76 to 109); one by one 576 x 1536 takes 180 to 360, torch 100. The compiler cannot trace
    the question for the processor: the larger number."""
    fast = not torch.compiler.is_compiling() and _in_registers(cols)
    return 1 << 21 if fast else 1 << 22


def kept_bytes(codes: Tensor) -> int:
    """Bytes of the copy that is kept of these codes."""
    kept = _prepared.get(codes)
    return 0 if kept is None else kept[1].nbytes


def _product(x_GD: Tensor, entries_DE: Tensor, codes: Tensor, rows: int) -> Tensor:
    """Σ_g x[g] · entries[:, code of g and r], float32 [R]."""
    if codes.dim() == 1:
        from vqllm_kernels.lut.permute_numba import kernel

        y_R = torch.empty(codes.numel() // len(x_GD))
        kernel(entries_DE.shape[1])(x_GD.numpy(), entries_DE.numpy(), codes.numpy(), y_R.numpy())
        return y_R[:rows]
    return _gather(x_GD @ entries_DE, codes)


def _gather(sums_GE: Tensor, codes_GR: Tensor) -> Tensor:
    """Σ_g sums[g, codes[g, r]], float32 [R]."""
    from vqllm_kernels.lut.gather_numba import add

    num_pieces, rows = codes_GR.shape
    sums, codes = sums_GE.numpy(), codes_GR.numpy()
    num_parts = PARTS if codes_GR.numel() >= LARGE else 1
    partial = torch.empty(num_parts, rows)
    out = partial.numpy()
    if num_parts == 1:
        add(sums, codes, 0, 1, num_pieces, out)
        return partial[0]
    threads = min(torch.get_num_threads(), num_parts)
    others = [
        _pool(threads).submit(add, sums, codes, i, threads, num_pieces, out)
        for i in range(1, threads)
    ]
    add(sums, codes, 0, threads, num_pieces, out)
    for other in others:
        other.result()
    return partial.sum(0)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="vqllm-lookup")


# A forked process has none of its parent's threads: their pool would wait for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


@cache
def _in_registers(cols: int) -> bool:
    from vqllm_kernels.lut.permute_numba import available

    return cols >= REGISTER_COLUMNS and available()
