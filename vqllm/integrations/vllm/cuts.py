"""What of a linear one process holds under tensor parallelism.

    y = P_n .. P_1 W' Q_m .. Q_1 x     transforms of the input Q, of the output P

A process is to have some rows of W (q, k, v, gate, up) or some columns (o, down). Where every
transform on that side is block diagonal and no block is cut in two, these are rows or columns of
W', and all is as without a transform (`rows_of`, `columns_of`). A full Hadamard transform mixes all
of them: then a process holds an equal share of the rows of W' (`share_of`), and y', from all
processes, goes through the transforms of the output in each of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vqllm.integrations.vllm.refusals import undivided
from vqllm_kernels.bitpack import pack_bits, unpack_bits
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.transforms import CodedScaleSpec, HadamardSpec, ScaleSpec, TransformSpec

Tensors = dict[str, Tensor]
Range = tuple[int, int]
"""The first one, and the one after the last."""


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
    if spec.rows % (tile_rows * size) or not _has_rows(spec):
        raise undivided(name, spec, size, tile_rows)


def ends_of_rows(spec: LinearSpec, own: Range) -> bool:
    """Whether some rows of W are a linear of their own: tiles and the transforms of the output end
    there."""
    start, stop = own
    if start == 0 and stop == spec.rows:
        return True
    tile_rows = spec.format.tile[0]
    return (
        start % tile_rows == 0
        and (stop % tile_rows == 0 or stop == spec.rows)
        and _has_rows(spec)
        and all(_ends(t, own) for t in spec.transforms if t.side == "out")
    )


def rows_of(spec: LinearSpec, tensors: Tensors, own: Range) -> tuple[LinearSpec, Tensors]:
    """The linear of some rows of W, which ends there."""
    if own == (0, spec.rows):
        return spec, tensors
    transforms, states = _cut_transforms(spec, tensors, "out", own)
    cut = replace(spec, rows=own[1] - own[0], transforms=transforms)
    return cut, {**spec.block(tensors, *own), **states}


def ends_of_columns(spec: LinearSpec, own: Range) -> bool:
    """Whether some columns of W are a linear of their own: tiles and the transforms of the input
    end there, and every tensor of the format has an axis of tiles of a row, or is for all."""
    start, stop = own
    if start == 0 and stop == spec.cols:
        return True
    tile_cols = spec.format.tile[1]
    if start % tile_cols or stop % tile_cols or spec.cols % tile_cols:
        return False
    every = spec.format.layout(spec.rows, spec.cols)
    some = spec.format.layout(spec.rows, stop - start)
    return all(
        _has_columns(spec, name) or tensor == some[name] for name, tensor in every.items()
    ) and all(_ends(t, own) for t in spec.transforms if t.side == "in")


def columns_of(spec: LinearSpec, tensors: Tensors, own: Range) -> tuple[LinearSpec, Tensors]:
    """The linear of some columns of W, which ends there. Its outputs, of all columns, add up to
    those of W."""
    start, stop = own
    if own == (0, spec.cols):
        return spec, tensors
    transforms, cut = _cut_transforms(spec, tensors, "in", own)
    tile_cols = spec.format.tile[1]
    for name in spec.format.layout(spec.rows, spec.cols):
        cut[name] = tensors[name]
        if _has_columns(spec, name):
            cut[name] = cut[name][:, start // tile_cols : stop // tile_cols].contiguous()
    return replace(spec, cols=stop - start, transforms=transforms), cut


def _has_columns(spec: LinearSpec, name: str) -> bool:
    """Whether the second axis of a tensor runs over the tiles of a row."""
    tensor = spec.format.layout(spec.rows, spec.cols)[name]
    return tensor.by_tile_row and tensor.shape[:2] == spec.format.grid(spec.rows, spec.cols)


def _has_rows(spec: LinearSpec) -> bool:
    """Whether rows of tiles can be decoded without the others, transforms apart."""
    return replace(spec, transforms=()).row_wise()


def _ends(transform: TransformSpec, own: Range) -> bool:
    """Whether no block of a transform is cut in two."""
    if isinstance(transform, HadamardSpec):
        return all(end % transform.order == 0 for end in own)
    return type(transform) in (ScaleSpec, CodedScaleSpec)


def _cut_transforms(
    spec: LinearSpec, tensors: Tensors, side: str, own: Range
) -> tuple[tuple[TransformSpec, ...], Tensors]:
    """All transforms, those of one side cut, and their tensors."""
    transforms: list[TransformSpec] = []
    states: Tensors = {}
    for i, transform in enumerate(spec.transforms):
        state = {name: tensors[f"t{i}_{name}"] for name in transform.layout()}
        if transform.side == side:
            transform, state = _cut(transform, state, own)
        transforms.append(transform)
        states |= {f"t{i}_{name}": tensor for name, tensor in state.items()}
    return tuple(transforms), states


def _cut(transform: TransformSpec, state: Tensors, own: Range) -> tuple[TransformSpec, Tensors]:
    start, stop = own
    size = stop - start
    if isinstance(transform, HadamardSpec):
        signs = _some(state["signs"], 1, transform.size, own)
        return replace(transform, size=size, block=transform.order), {"signs": signs}
    if isinstance(transform, CodedScaleSpec):
        index = _some(state["index"], transform.bits, transform.size, own)
        return replace(transform, size=size), {**state, "index": index}
    return replace(transform, size=size), {"scale": state["scale"][start:stop].contiguous()}


def _some(packed: Tensor, bits: int, size: int, own: Range) -> Tensor:
    """Some numbers of a packed vector."""
    return pack_bits(unpack_bits(packed, bits, size)[own[0] : own[1]], bits)


def dense_rows(W_RC: Tensor, ranges: Sequence[Range]) -> Tensor:
    """Rows of decoded weights."""
    if len(ranges) == 1:
        [(start, stop)] = ranges
        return W_RC[start:stop]
    return torch.cat([W_RC[start:stop] for start, stop in ranges])
