"""Products with looked-up sums on a CPU, for codebooks of at most 256 entries along the columns.

With the inputs cut into pieces of d columns, one small product gives the inner product of every
entry with every piece, [pieces, 256]. A tile of W then costs one look-up and an addition, whatever
d is, and no weight is ever decoded. Codes of all rows for one piece lie side by side, so that the
inner loop walks along them and its 256 products stay in the first-level cache.

4096 x 4096 at 2 bits (d = 4) takes 0.51 ms on two cores of an AMD EPYC with AVX-512 where torch's
bfloat16 product takes 2.0 ms.

Source: the idea is that of AQLM's CPU kernel, arXiv 2401.06118, section 3.4.
"""

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
"""Pieces are dealt out to so many sums, which are added in their order: the result does not depend
on the number of threads."""
THREADED = 1 << 19
"""Look-ups from which on threads pay: waking one takes 15 to 30 us, in which a core does 2^17."""

_by_piece = WeakTensorKeyDictionary()
"""Codes as stored -> (their version, the same by piece)."""


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
    stages = _stages(spec)
    x = x_NC.to(torch.float32)
    y_NR = torch.zeros(len(x), rows)
    for i, stage in enumerate(stages):
        own = stage_tensors(tensors, i) if isinstance(spec, ResidualSpec) else tensors
        entries_ED = _entries(stage, own)
        codes_GR = _codes_by_piece(stage, own["codes"], cols)
        width = entries_ED.shape[1]
        padded = torch.nn.functional.pad(x, (0, len(codes_GR) * width - cols))
        sums_NGE = padded.unflatten(1, (-1, width)) @ entries_ED.T
        for n in range(len(x)):
            y_NR[n] += _gather(sums_NGE[n].contiguous(), codes_GR)
    return y_NR.to(x_NC.dtype)


def kept_bytes(codes: Tensor) -> int:
    """Bytes of the copy that is kept of these codes."""
    kept = _by_piece.get(codes)
    return 0 if kept is None else kept[1].nbytes


def _stages(spec: FormatSpec) -> tuple[FormatSpec, ...]:
    return spec.stages if isinstance(spec, ResidualSpec) else (spec,)


def _entries(stage: FormatSpec, tensors: dict[str, Tensor]) -> Tensor:
    """All entries of the table, float32 [2^bits, d]."""
    if isinstance(stage, LutSpec):
        return tensors["codebook"].float()
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    return stage.decode({**tensors, "codes": every}, 256, stage.tile[1])


def _codes_by_piece(stage: FormatSpec, codes: Tensor, cols: int) -> Tensor:
    """uint8 [pieces, rows]."""
    version = 0 if codes.is_inference() else codes._version
    kept = _by_piece.get(codes)
    if kept is not None and kept[0] == version:
        return kept[1]
    bits = stage.index_bits if isinstance(stage, LutSpec) else MAX_BITS
    with torch.inference_mode(False), torch.no_grad():
        index_RG = unpack_bits(codes, bits, -(-cols // stage.tile[1]))
        codes_GR = index_RG.to(torch.uint8).T.contiguous()
    _by_piece[codes] = (version, codes_GR)
    return codes_GR


def _gather(sums_GE: Tensor, codes_GR: Tensor) -> Tensor:
    """Σ_g sums[g, codes[g, r]], float32 [R]."""
    num_pieces, rows = codes_GR.shape
    partial = torch.empty(PARTS, rows)
    bounds = [num_pieces * i // PARTS for i in range(PARTS + 1)]
    sums, codes, out = sums_GE.numpy(), codes_GR.numpy(), partial.numpy()
    from vqllm_kernels.lut.gather_numba import add

    def run(first: int, step: int) -> None:
        for i in range(first, PARTS, step):
            add(sums, codes, bounds[i], bounds[i + 1], out[i])

    threads = min(torch.get_num_threads(), PARTS) if codes_GR.numel() >= THREADED else 1
    others = [_pool(threads).submit(run, i, threads) for i in range(1, threads)]
    run(0, threads)
    for other in others:
        other.result()
    return partial.sum(0)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="vqllm-lookup")


@cache
def _has_numba() -> bool:
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True
