"""VPTQ's linears in our own formats: lut-v1, with groups lut-v2, with residuals residual-v1, with
outliers split-v1, between an order of the inputs and their scales."""

import torch
from torch import Tensor

from vqllm.foreign.base import CannotHoldError, Packed, Stored, exact_half
from vqllm.foreign.vptq_layer import Layer, indices, order, outlier_indices
from vqllm_kernels.bitpack import pack_bits
from vqllm_kernels.formats import FormatSpec
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.lut.spec import GroupedLutSpec, LutSpec
from vqllm_kernels.residual.spec import ResidualSpec
from vqllm_kernels.split import reference as split
from vqllm_kernels.split.spec import SplitSpec
from vqllm_kernels.transforms import PermutationSpec, ScaleSpec, TransformSpec


def pack(module: Stored, own: Layer) -> Packed:
    """A linear as one of ours.

    Raises:
        CannotHoldError: it adds something to its weights, or a number has no equal in float16.
    """
    transforms, states = _transforms(module, own)
    main = _main_spec(own)
    halves = {
        name: exact_half(f"{name}.weight", module.read(f"{name}.weight"))
        for name in ("centroids", "res_centroids", "outlier_centroids")
        if f"{name}.weight" in module.headers
    }
    format = _with_outliers(main, own) if own.outliers else main

    def make() -> dict[str, Tensor]:
        tensors = _main_tensors(module, own, halves)
        if isinstance(format, SplitSpec):
            tensors = _split_tensors(module, own, format, halves, tensors)
        for i, state in enumerate(states):
            tensors |= {f"t{i}_{key}": value for key, value in state.items()}
        return tensors

    spec = LinearSpec(rows=own.rows, cols=own.cols, format=format, transforms=transforms)
    return spec, make


def _transforms(
    module: Stored, own: Layer
) -> tuple[tuple[TransformSpec, ...], list[dict[str, Tensor]]]:
    transforms, states = [], []
    if own.has_scale:
        if bool(module.read("weight_bias").any()):
            raise CannotHoldError(
                "it has a weight_bias that is not 0, which is added to its weights, and no format "
                "of ours has a place for it"
            )
        scale = exact_half("weight_scale", module.read("weight_scale"))
        if not bool(scale.all()):
            raise CannotHoldError("a weight_scale is 0, and scales of ours are not")
        side, size = ("out", own.rows) if own.of_outputs else ("in", own.cols)
        transforms.append(ScaleSpec(side=side, size=size))
        states.append({"scale": scale})
    if own.has_order:
        transforms.append(PermutationSpec(side="in", size=own.cols))
        states.append({"permutation": order(module, own).int()})
    return tuple(transforms), states


def _main_spec(own: Layer) -> FormatSpec:
    """Of all inputs but outliers."""
    stages = [own.index_bits, own.residual_bits][: 1 + bool(own.residuals)]
    if own.num_groups == 1:
        every: list[FormatSpec] = [
            LutSpec(tile_rows=own.length, tile_cols=1, index_bits=bits) for bits in stages
        ]
    else:
        every = [
            GroupedLutSpec(tile_rows=own.length, tile_cols=1, index_bits=bits, group_cols=own.group)
            for bits in stages
        ]
    return every[0] if len(every) == 1 else ResidualSpec(stages=tuple(every))


def _main_tensors(module: Stored, own: Layer, halves: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors, num_vectors = {}, -(-own.rows // own.length)
    for stage, name in enumerate(("centroids", "res_centroids")[: 1 + bool(own.residuals)]):
        prefix = f"s{stage}_" if own.residuals else ""
        bits = own.residual_bits if stage else own.index_bits
        index_GIS = indices(module, own, residual=bool(stage))(0, num_vectors)
        index_IC = index_GIS.transpose(0, 1).flatten(1)[:, : own.cols - own.outliers]
        table = halves[name].view(own.num_groups, -1, own.length)
        tensors[f"{prefix}codes"] = pack_bits(index_IC, bits)
        tensors[f"{prefix}codebook"] = table[0] if own.num_groups == 1 else table[None]
    return {key: value.contiguous() for key, value in tensors.items()}


def _with_outliers(main: FormatSpec, own: Layer) -> SplitSpec:
    bits = own.outlier_entries.bit_length() - 1
    first = LutSpec(tile_rows=own.outlier_length, tile_cols=1, index_bits=bits)
    return SplitSpec(share=own.outliers / own.cols, first=first, rest=main)


def _split_tensors(
    module: Stored,
    own: Layer,
    format: SplitSpec,
    halves: dict[str, Tensor],
    rest: dict[str, Tensor],
) -> dict[str, Tensor]:
    codes = pack_bits(outlier_indices(module, own), own.outlier_entries.bit_length() - 1)
    first = {
        "codes": codes,
        "codebook": halves["outlier_centroids"].view(-1, own.outlier_length).contiguous(),
    }
    tile_rows = format.tile[0]
    num_rows = -(-own.rows // tile_rows) * tile_rows
    tensors = {}
    for name, part, stored in zip(split.PARTS, format.parts, (first, rest), strict=True):
        layout = part.layout(num_rows, own.cols)
        padded = {
            key: _padded(value, layout[key].shape[0]) if layout[key].by_tile_row else value
            for key, value in stored.items()
        }
        every = split.stacked(padded, part, tile_rows)
        tensors |= {f"{name}_{key}": value for key, value in every.items()}
    return tensors


def _padded(codes: Tensor, num_rows: int) -> Tensor:
    """With rows of zeros at the end, for tiles that no output fills."""
    return torch.nn.functional.pad(codes, (0, 0, 0, num_rows - len(codes)))
