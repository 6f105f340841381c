"""What of a linear one process holds under tensor parallelism.

    y = P_n .. P_1 W' Q_m .. Q_1 x     transforms of the input Q, of the output P

A process is to have some rows of W (q, k, v, gate, up) or some columns (o, down). Where every
transform on that side is block diagonal and no block is cut in two, these are rows or columns of
W', and all is as without a transform (`vqllm_kernels.slices`). A full Hadamard transform mixes all
of them: then a process holds an equal share of the rows of W' (`share_of`), and y', from all
processes, goes through the transforms of the output in each of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vqllm.integrations.vllm.refusals import undivided
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.slices import Range, Tensors, has_rows


@dataclass(frozen=True)
class Piece:
    """Rows of W that processes share out: those of q, k, v, gate, up or of the whole linear."""

    rows: int
    replicas: int = 1
    """Processes that hold the same rows: of k and v, where there are fewer heads than processes."""

    def own(self, rank: int, size: int, start: int = 0) -> Range:
        """The rows of one process, of a piece whose first row is `start`."""
        step = self.rows * self.replicas // size
        first = start + rank // self.replicas * step
        return first, first + step


def own_rows(
    parts: Sequence[int], pieces: Sequence[Piece], rank: int, size: int
) -> list[list[Range]] | None:
    """The rows that a process has of each part of a fused linear, one range for each piece.

    Args:
        parts: the rows of the parts, as they are stored.
        pieces: as vLLM shares them out: either every part is a piece, or one part is all of them
            (Phi-3 stores q, k and v as one matrix).

    Returns:
        None if parts are neither.
    """
    sizes = [piece.rows for piece in pieces]
    if list(parts) == sizes:
        return [[piece.own(rank, size)] for piece in pieces]
    if len(parts) == 1 and parts[0] == sum(sizes):
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [[piece.own(rank, size, start) for piece, start in zip(pieces, starts)]]
    return None


def share_of(
    spec: LinearSpec, tensors: Tensors, rank: int, size: int
) -> tuple[LinearSpec, Tensors]:
    """An equal share of the rows of W', without the transforms of the output; rows of tiles
    divide."""
    rows = spec.rows // size
    block = spec.block(tensors, rank * rows, (rank + 1) * rows)
    inputs = [(i, t) for i, t in enumerate(spec.transforms) if t.side == "in"]
    for new, (old, transform) in enumerate(inputs):
        block |= {f"t{new}_{own}": tensors[f"t{old}_{own}"] for own in transform.layout()}
    return replace(spec, rows=rows, transforms=tuple(t for _, t in inputs)), block


def check_divides(name: str, spec: LinearSpec, size: int) -> None:
    """Raise ModelError unless rows of tiles can be dealt out in equal numbers."""
    tile_rows = spec.format.tile[0]
    if spec.rows % (tile_rows * size) or not has_rows(spec):
        raise undivided(name, spec, size, tile_rows)


def dense_rows(W_RC: Tensor, ranges: Sequence[Range]) -> Tensor:
    """Rows of decoded weights."""
    if len(ranges) == 1:
        [(start, stop)] = ranges
        return W_RC[start:stop]
    return torch.cat([W_RC[start:stop] for start, stop in ranges])
