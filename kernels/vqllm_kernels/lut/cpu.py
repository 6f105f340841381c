"""Products with looked-up sums on a CPU, for codebooks of at most 256 entries along the columns.

With the inputs cut into pieces of d columns, one small product gives the inner product of every
entry with every piece, [pieces, 256]. A tile of W then costs one look-up and an addition, whatever
d is, and no weight is ever decoded. Codes of all rows for one piece lie side by side, so that the
inner loop walks along them and its 256 products stay in the first-level cache.

4096 x 4096 at 2 bits (d = 4) takes 1.4 ms where torch's bfloat16 product takes 1.7 on two cores, at
1 bit (d = 8) 0.8 ms (kernels/bench/results/cpu.csv).

Source: the idea is that of AQLM's CPU kernel, arXiv 2401.06118, section 3.4.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vqllm_kernels.bitpack import unpack_bits
from vqllm_kernels.e8p.spec import E81BSpec
from vqllm_kernels.formats import FormatSpec
from vqllm_kernels.lut.spec import LutSpec
from vqllm_kernels.residual.reference import stage_tensors
from vqllm_kernels.residual.spec import ResidualSpec

MAX_BITS = 8
PARTS = 8
"""Pieces of a large matrix are dealt out to so many sums, which are added in their order: the
result does not depend on the number of threads."""
LARGE = 1 << 23
"""Look-ups from which on threads pay: 4096 x 4096 at d = 4 (2^22) takes 1.2 ms on one core and 1.5
on two, a thread of Python's being slow to wake; 14336 x 4096 3.8 ms and 2.8 to 4.2."""

_prepared = WeakTensorKeyDictionary()
"""Codes as stored -> (addresses and versions of what went in, codes by piece, entries)."""


def declines(spec: FormatSpec) -> str | None:
    """Why a format cannot be served, or None."""
    if not _has_numba():
        return "numba is not installed"
    for stage in _stages(spec):
        if isinstance(stage, E81BSpec):
            continue
        if not isinstance(stage, LutSpec):
            return f"{stage.format_id} is no table of at most {1 << MAX_BITS} entries"
        if stage.tile_rows != 1 or stage.index_bits > MAX_BITS:
            return (
                f"entries of {stage.tile_rows} rows, {stage.index_bits} bits; look-ups take one "
                f"row and at most {MAX_BITS} bits"
            )
    return None


def matmul(
    x_NC: Tensor, tensors: dict[str, Tensor], spec: FormatSpec, rows: int, cols: int
) -> Tensor:
    """x Wᵀ in the dtype of x; sums in float32.

    The codes by piece, one byte each, are kept beside the stored ones for as long as those live.
    """
    if len(x_NC) == 0:
        return x_NC.new_empty(0, rows)
    x = x_NC.to(torch.float32)
    y_NR: Tensor | None = None
    for i, stage in enumerate(_stages(spec)):
        own = stage_tensors(tensors, i) if isinstance(spec, ResidualSpec) else tensors
        codes_GR, entries_DE = _by_piece(stage, own, cols)
        width = len(entries_DE)
        missing = len(codes_GR) * width - cols
        padded = torch.nn.functional.pad(x, (0, missing)) if missing else x
        sums_NGE = padded.view(len(x), -1, width) @ entries_DE
        y = torch.stack([_gather(sums_GE, codes_GR) for sums_GE in sums_NGE.unbind()])
        y_NR = y if y_NR is None else y_NR + y
    assert y_NR is not None, "a format has a stage"
    return y_NR.to(x_NC.dtype)


def kept_bytes(codes: Tensor) -> int:
    """Bytes of the copy that is kept of these codes."""
    kept = _prepared.get(codes)
    return 0 if kept is None else kept[1].nbytes


def _stages(spec: FormatSpec) -> tuple[FormatSpec, ...]:
    return spec.stages if isinstance(spec, ResidualSpec) else (spec,)


def _by_piece(stage: FormatSpec, tensors: dict[str, Tensor], cols: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [pieces, rows], and all entries of the table, float32 [d, 2^bits]."""
    codes = tensors["codes"]
    key = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors.values()]
    kept = _prepared.get(codes)
    if kept is None or kept[0] != key:
        with torch.inference_mode(False), torch.no_grad():
            bits = stage.index_bits if isinstance(stage, LutSpec) else MAX_BITS
            index_RG = unpack_bits(codes, bits, -(-cols // stage.tile[1]))
            codes_GR = index_RG.to(torch.uint8).T.contiguous()
            if isinstance(stage, LutSpec):
                entries_ED = tensors["codebook"].float()
            else:
                every = torch.arange(256, dtype=torch.uint8)[:, None]
                entries_ED = stage.decode({**tensors, "codes": every}, 256, stage.tile[1])
            kept = (key, codes_GR, entries_ED.T.contiguous())
        _prepared[codes] = kept
    return kept[1], kept[2]


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
def _has_numba() -> bool:
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True
