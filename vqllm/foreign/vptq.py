"""VPTQ: vectors along the outputs, which are entries of a codebook plus entries of a second one.

A linear of C inputs and R outputs. The first O inputs of its own order (outliers) have a codebook
of their own; the others are G groups of S inputs, and each group has a codebook of n entries of v
outputs and, with residuals, a second one of m entries:

    indices                   int32 [G, ⌈R/v⌉, words]   one number an input, lowest bits first:
                                                        residual << log2(n) | entry
    centroids.weight          float [G, n·v]
    res_centroids.weight      float [G, m·v]
    outlier_indices           int16 [1, ⌈R/u⌉, O]       without a sign
    outlier_centroids.weight  float [1, k·u]
    perm                      int16 [C]                 without a sign: input perm[j] of the model
                                                        is input j of the codes
    weight_scale, weight_bias float [C]                 of the model's inputs; [R] with norm_dim 1

Outputs beyond R and inputs beyond C are padding. Where indices are not packed
(`is_indice_packed`), they are int16 without a sign, or float16 of the same bits, and those of
residuals stand in `res_indices`.

Source: arXiv 2409.17066; the layout is that of microsoft/VPTQ's VQuantLinear.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from vqllm.foreign import vptq_packing
from vqllm.foreign.base import FLOATS, ForeignFormat, Options, Packed, Rows, Shape, Stored
from vqllm.foreign.vptq_layer import (
    METHOD,
    Layer,
    indices,
    order,
    outlier_indices,
    read_options,
    scale_and_bias,
)


@dataclass(frozen=True)
class Vptq(ForeignFormat):
    """The options of each linear by its name, and of others by the last part of it."""

    method: ClassVar[str] = METHOD
    marker: ClassVar[str] = "indices"
    tables: ClassVar[frozenset[str]] = frozenset(
        {"centroids.weight", "res_centroids.weight", "outlier_centroids.weight"}
    )
    codes: ClassVar[frozenset[str]] = frozenset({"indices", "res_indices", "outlier_indices"})
    names: ClassVar[frozenset[str]] = codes | tables | {"perm", "weight_scale", "weight_bias"}

    layers: Mapping[str, Layer]
    shared: Mapping[str, Layer]

    @classmethod
    def from_config(cls, values: Mapping[str, Any], where: str) -> Self:
        options = Options(cls.method, values, where)
        found = {}
        for key in ("config_for_layers", "shared_layer_config"):
            layers = options.take(key) or {}
            if not isinstance(layers, Mapping):
                options.refuse(key, layers, "an object with the options of each linear")
            found[key] = {
                name: read_options(own, f"{where}.{key}.{name}") for name, own in layers.items()
            }
        if not any(found.values()):
            options.refuse("config_for_layers", None, "an object with the options of each linear")
        options.choice("enable_proxy_error", (False,), False)
        options.ignore("modules_to_not_convert")
        options.end()
        return cls(*found.values())

    def shape(self, module: Stored) -> Shape:
        own = self._of(module)
        num_vectors = -(-own.rows // own.length)
        what = f"{own.rows} x {own.cols} weights, vectors of {own.length}"
        if own.is_packed:
            words = -(-own.group * (own.index_bits + own.residual_bits) // 32)
            module.expect("indices", ("I32",), (own.num_groups, num_vectors, words), what)
        else:
            every = (own.num_groups, num_vectors, own.group)
            for name in ("indices", "res_indices")[: 1 + bool(own.residuals)]:
                module.expect(name, ("I16", "F16"), every, what)
        for name, entries in (("centroids", own.entries), ("res_centroids", own.residuals)):
            if entries:
                size = (own.num_groups, entries * own.length)
                module.expect(f"{name}.weight", FLOATS, size, f"{entries} entries, {what}")
        if own.outliers:
            size = (1, -(-own.rows // own.outlier_length), own.outliers)
            what = f"{own.outliers} inputs, vectors of {own.outlier_length}"
            module.expect("outlier_indices", ("I16", "F16", "I32"), size, what)
            size = (1, own.outlier_entries * own.outlier_length)
            module.expect("outlier_centroids.weight", FLOATS, size, what)
        if own.has_order:
            module.expect("perm", ("I16", "I32", "I64"), (own.cols,), "the order of its inputs")
        if own.has_scale:
            for name in ("weight_scale", "weight_bias"):
                size = own.rows if own.of_outputs else own.cols
                module.expect(name, FLOATS, (size,), "outputs" if own.of_outputs else "inputs")
        return Shape(own.rows, own.cols, math.lcm(own.length, own.outlier_length))

    def rows(self, module: Stored, shape: Shape) -> Rows:
        own = self._of(module)
        parts = [_looked_up(indices(module, own), _tables(module, "centroids", own), own)]
        if own.residuals:
            every = indices(module, own, residual=True)
            parts.append(_looked_up(every, _tables(module, "res_centroids", own), own))
        outlier_values = _outliers(module, own) if own.outliers else None
        back_C = order(module, own).argsort() if own.has_order else None
        affine = scale_and_bias(module, own) if own.has_scale else None

        def decode(start: int, stop: int) -> Tensor:
            weight = parts[0](start, stop)
            if own.residuals:
                weight += parts[1](start, stop)
            if outlier_values is not None:
                weight = torch.cat([outlier_values(start, stop), weight], 1)
            weight = weight[:, : own.cols]
            if back_C is not None:
                weight = weight[:, back_C]
            if affine is not None:
                scale, bias = (part[start:stop] if own.of_outputs else part for part in affine)
                weight = weight * scale + bias
            return weight

        return decode

    def describe(self, module: Stored, shape: Shape) -> str:
        own = self._of(module)
        bits = f"{own.index_bits} + {own.residual_bits}" if own.residuals else f"{own.index_bits}"
        outliers = f", {own.outliers} outlier inputs" if own.outliers else ""
        return f"{bits} bits for {own.length} x 1{outliers}"

    def pack(self, module: Stored, shape: Shape) -> Packed:
        return vptq_packing.pack(module, self._of(module))

    def _of(self, module: Stored) -> Layer:
        last = module.name.rpartition(".")[2]
        own = self.layers.get(module.name) or self.shared.get(last)
        if own is None:
            raise module.wrong(
                "it has indices, but config_for_layers in config.json does not have its name"
            )
        return own


def _looked_up(read: Callable[[int, int], Tensor], tables: Tensor, own: Layer) -> Rows:
    """The weights of all groups, of tables [G, n, v]."""

    def decode(start: int, stop: int) -> Tensor:
        index_GIS = read(start // own.length, -(-stop // own.length))
        groups = [
            table[index].transpose(1, 2).flatten(0, 1)
            for table, index in zip(tables, index_GIS, strict=True)
        ]
        return torch.cat(groups, 1)[: stop - start]

    return decode


def _outliers(module: Stored, own: Layer) -> Rows:
    index_IO = outlier_indices(module, own)
    table = module.read("outlier_centroids.weight").float().view(-1, own.outlier_length)

    def decode(start: int, stop: int) -> Tensor:
        first, last = start // own.outlier_length, -(-stop // own.outlier_length)
        values = table[index_IO[first:last]].transpose(1, 2).flatten(0, 1)
        return values[: stop - start]

    return decode


def _tables(module: Stored, name: str, own: Layer) -> Tensor:
    """Codebooks, float32 [G, entries, length]."""
    stored = module.read(f"{name}.weight").float()
    return stored.view(own.num_groups, -1, own.length)
