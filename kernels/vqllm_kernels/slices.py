"""Some rows or columns of a packed linear, as a linear of their own.

They are one where tiles end there, where no block of a transform on that side is cut in two, and
where each stored tensor has a part for them or serves all.
"""

from dataclasses import replace

from torch import Tensor

from vqllm_kernels.bitpack import pack_bits, unpack_bits
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.transforms import (
    BlockDiagonalSpec,
    CodedScaleSpec,
    HadamardSpec,
    ScaleSpec,
    TransformSpec,
)

Tensors = dict[str, Tensor]
Range = tuple[int, int]
"""The first one, and the one after the last."""


def ends_of_rows(spec: LinearSpec, own: Range) -> bool:
    """Whether some rows of W are a linear of their own."""
    return obstacle_to_rows(spec, own) is None


def obstacle_to_rows(spec: LinearSpec, own: Range) -> str | None:
    """Why some rows of W are no linear of their own; None if they are."""
    start, stop = own
    if start == 0 and stop == spec.rows:
        return None
    tile_rows = spec.format.tile[0]
    if start % tile_rows or (stop % tile_rows and stop != spec.rows):
        return f"tiles have {tile_rows} rows"
    if not has_rows(spec):
        return f"{spec.format.format_id} stores numbers that all rows share"
    return _obstacle_to_blocks(spec, "out", own)


def rows_of(spec: LinearSpec, tensors: Tensors, own: Range) -> tuple[LinearSpec, Tensors]:
    """The linear of some rows of W, which ends there."""
    if own == (0, spec.rows):
        return spec, tensors
    transforms, states = _cut_transforms(spec, tensors, "out", own)
    cut = replace(spec, rows=own[1] - own[0], transforms=transforms)
    return cut, {**spec.block(tensors, *own), **states}


def ends_of_columns(spec: LinearSpec, own: Range) -> bool:
    """Whether some columns of W are a linear of their own."""
    return obstacle_to_columns(spec, own) is None


def obstacle_to_columns(spec: LinearSpec, own: Range) -> str | None:
    """Why some columns of W are no linear of their own; None if they are."""
    start, stop = own
    if start == 0 and stop == spec.cols:
        return None
    tile_cols = spec.format.tile[1]
    if start % tile_cols or stop % tile_cols or spec.cols % tile_cols:
        return f"tiles have {tile_cols} columns"
    every = spec.format.layout(spec.rows, spec.cols)
    some = spec.format.layout(spec.rows, stop - start)
    if not all(_has_columns(spec, name) or own == some[name] for name, own in every.items()):
        return f"{spec.format.format_id} packs a row as a whole"
    return _obstacle_to_blocks(spec, "in", own)


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


def has_rows(spec: LinearSpec) -> bool:
    """Whether rows of tiles can be decoded without the others, transforms apart."""
    return replace(spec, transforms=()).row_wise()


def _obstacle_to_blocks(spec: LinearSpec, side: str, own: Range) -> str | None:
    """Which transform of a side mixes these features with others; None if there is none."""
    for transform in spec.transforms:
        if transform.side == side and not _ends(transform, own):
            return f"the transform {transform.kind} mixes them with others"
    return None


def _ends(transform: TransformSpec, own: Range) -> bool:
    """Whether no block of a transform is cut in two."""
    if isinstance(transform, HadamardSpec):
        return all(end % transform.order == 0 for end in own)
    if isinstance(transform, BlockDiagonalSpec):
        return all(end % transform.block == 0 or end == transform.size for end in own)
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
    if isinstance(transform, BlockDiagonalSpec):
        return _cut_blocks(transform, state, own)
    if isinstance(transform, CodedScaleSpec):
        index = _some(state["index"], transform.bits, transform.size, own)
        return replace(transform, size=size), {**state, "index": index}
    return replace(transform, size=size), {"scale": state["scale"][start:stop].contiguous()}


def _cut_blocks(
    transform: BlockDiagonalSpec, state: Tensors, own: Range
) -> tuple[TransformSpec, Tensors]:
    start, stop = own
    block = min(transform.block, stop - start)
    if block < transform.block:  # what is left behind the last whole block
        return replace(transform, size=block, block=block), {"blocks": state["last"][None].clone()}
    blocks = state["blocks"][start // block : stop // block].contiguous()
    rest = {"last": state["last"]} if stop % block else {}
    return replace(transform, size=stop - start), {"blocks": blocks, **rest}


def _some(packed: Tensor, bits: int, size: int, own: Range) -> Tensor:
    """Some numbers of a packed vector."""
    return pack_bits(unpack_bits(packed, bits, size)[own[0] : own[1]], bits)
