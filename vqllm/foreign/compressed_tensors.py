"""compressed-tensors in its format "pack-quantized", integers of few bits, of llm-compressor.

A linear of R x C weights, b bits each, G groups of columns:

    weight_packed      int32 [R, C·b/32]   q + 2^(b−1), along rows, lowest bits first
    weight_scale       float [R, G]
    weight_zero_point  int32 [R·b/32, G]   zero point + 2^(b−1), packed along the outputs, lowest
                                           bits first; int8 [R, G] where it is not packed. Only if
                                           not symmetric
    weight_shape       int [2]             R and C
    weight_g_idx       int32 [C]           the group of each column; only with actorder "group"

Widths that do not divide 32 are left out: versions of the package pack them differently.

Source: https://github.com/vllm-project/compressed-tensors, its documentation of the format.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from vqllm.foreign.base import FLOATS, ForeignFormat, Options, Packed, Rows, Shape, Stored
from vqllm.foreign.groups import Grouped, as_bytes, regular
from vqllm_kernels.bitpack import packed_bytes, unpack_bits

BITS = (2, 4, 8)
FORMAT = "pack-quantized"
NOTES = ("ignore", "global_compression_ratio", "version", "quantization_status", "kv_cache_scheme")
"""Keys that say nothing about the stored weights. How a cache of keys and values would be stored is
no part of them."""
CHOSEN = ("observer", "observer_kwargs", "actorder", "dynamic", "scale_dtype", "zp_dtype")
"""Options of a scheme that say how codes were chosen, or what the tensors say themselves."""


@dataclass(frozen=True)
class Scheme:
    """How the weights of some modules are stored."""

    bits: int
    group: int | None
    symmetric: bool


@dataclass(frozen=True)
class CompressedTensors(ForeignFormat):
    """`schemes` are those of the configuration; a module has the one that its tensors fit."""

    method: ClassVar[str] = "compressed-tensors"
    marker: ClassVar[str] = "weight_packed"
    names: ClassVar[frozenset[str]] = frozenset(
        f"weight_{name}" for name in ("packed", "scale", "zero_point", "shape", "g_idx")
    )
    codes: ClassVar[frozenset[str]] = frozenset({"weight_packed"})

    schemes: tuple[Scheme, ...]

    @classmethod
    def from_config(cls, values: Mapping[str, Any], where: str) -> Self:
        options = Options(cls.method, values, where)
        options.choice("format", (FORMAT, "mixed-precision"), FORMAT)
        groups = options.take("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            options.refuse("config_groups", groups, "an object of one or more schemes")
        sparsity = options.take("sparsity_config") or {}
        if sparsity and sparsity.get("format") != "dense":
            options.refuse("sparsity_config", sparsity, "none")
        transforms = options.take("transform_config") or {}
        if transforms and transforms.get("config_groups"):
            options.refuse("transform_config", transforms, "none, as rotated models need")
        options.ignore(*NOTES)
        options.end()
        return cls(tuple(_scheme(name, of, where) for name, of in groups.items()))

    def shape(self, module: Stored) -> Shape:
        rows, words = module.shape("weight_packed", 2)
        module.expect("weight_shape", ("I64", "I32"), (2,), "rows and columns")
        stored = tuple(module.read("weight_shape").tolist())
        cols = stored[1]
        if stored[0] != rows or cols < 1:
            raise module.wrong(f"its weight_shape is {stored}, and there are codes of {rows} rows")
        scheme = self._scheme(module, cols, words)
        num_groups = -(-cols // (scheme.group or cols))
        what = f"{rows} x {cols} weights of {scheme.bits} bits in {num_groups} groups"
        module.expect("weight_packed", ("I32",), (rows, words), what)
        module.expect("weight_scale", FLOATS, (rows, num_groups), what)
        if "weight_g_idx" in module.headers:
            module.expect("weight_g_idx", ("I32", "I64"), (cols,), what)
        if scheme.symmetric:
            return Shape(rows, cols)
        module.need("weight_zero_point")
        if module.headers["weight_zero_point"].dtype == "I8":
            module.expect("weight_zero_point", ("I8",), (rows, num_groups), what)
        else:
            packed = (-(-rows * scheme.bits // 32), num_groups)
            module.expect("weight_zero_point", ("I32",), packed, what)
        return Shape(rows, cols)

    def rows(self, module: Stored, shape: Shape) -> Rows:
        return self._grouped(module, shape).rows()

    def describe(self, module: Stored, shape: Shape) -> str:
        scheme = self._of(module, shape)
        return f"{scheme.bits} bits, groups of {scheme.group or shape.cols}"

    def pack(self, module: Stored, shape: Shape) -> Packed:
        return self._grouped(module, shape).pack(self._of(module, shape).group)

    def _of(self, module: Stored, shape: Shape) -> Scheme:
        return self._scheme(module, shape.cols, module.headers["weight_packed"].shape[1])

    def _scheme(self, module: Stored, cols: int, words: int) -> Scheme:
        """The scheme that the shapes of a module's tensors fit."""
        num_groups = module.shape("weight_scale", 2)[1]
        fitting = [
            scheme
            for scheme in self.schemes
            if -(-cols * scheme.bits // 32) == words
            and -(-cols // (scheme.group or cols)) == num_groups
            and scheme.symmetric == ("weight_zero_point" not in module.headers)
        ]
        if not fitting:
            wanted = " or ".join(_told(self.schemes))
            module.refuse("weight_packed", f"that of {cols} columns with {wanted}")
        return fitting[0]

    def _grouped(self, module: Stored, shape: Shape) -> Grouped:
        scheme = self._of(module, shape)
        scale_RG = module.read("weight_scale")
        packed = cache(lambda: module.read("weight_packed"))

        def codes(start: int, stop: int) -> Tensor:
            return _unpacked(packed()[start:stop], scheme.bits, shape.cols)

        return Grouped(
            scheme.bits,
            codes,
            scale_RG,
            _zeros(module, scheme, scale_RG),
            _groups(module, scheme, shape.cols, scale_RG.shape[1]),
        )


def _zeros(module: Stored, scheme: Scheme, scale_RG: Tensor) -> Tensor:
    middle = 1 << (scheme.bits - 1)
    if scheme.symmetric:
        return torch.full(scale_RG.shape, middle, dtype=torch.int32)
    stored = module.read("weight_zero_point")
    if stored.dtype == torch.int8:
        return stored.int() + middle
    return _unpacked(stored.T, scheme.bits, len(scale_RG)).T


def _groups(module: Stored, scheme: Scheme, cols: int, num_groups: int) -> Tensor:
    if "weight_g_idx" not in module.headers:
        return regular(cols, scheme.group)
    group_C = module.read("weight_g_idx").long()
    if int(group_C.max()) < 0:  # what is written where columns were not reordered
        return regular(cols, scheme.group)
    if int(group_C.min()) < 0 or int(group_C.max()) >= num_groups:
        raise module.wrong(
            f"its weight_g_idx has groups {int(group_C.min())}..{int(group_C.max())}, and there "
            f"are scales for 0..{num_groups - 1}"
        )
    return group_C


def _unpacked(words: Tensor, bits: int, num_symbols: int) -> Tensor:
    """The first symbols of rows of words, int32 [n, num_symbols]."""
    own = as_bytes(words)[:, : packed_bytes(num_symbols, bits)]
    return unpack_bits(own, bits, num_symbols)


def _scheme(name: str, values: Any, where: str) -> Scheme:
    where = f"{where}.config_groups.{name}"
    options = Options(CompressedTensors.method, values if isinstance(values, dict) else {}, where)
    weights = options.take("weights")
    if not isinstance(weights, Mapping):
        options.refuse("weights", weights, "an object with num_bits and strategy")
    options.choice("format", (FORMAT, None), FORMAT)
    options.ignore("targets")
    options.end()  # codes of inputs and outputs change what the model computes
    own = Options(CompressedTensors.method, weights, f"{where}.weights")
    bits = own.number("num_bits", BITS)
    own.choice("type", ("int",), "int")
    symmetric = own.choice("symmetric", (True, False), True)
    strategy = own.choice("strategy", ("group", "channel"), "channel")
    group = own.take("group_size")
    if strategy == "group" and (type(group) is not int or group < 1):
        own.refuse("group_size", group, "a number of columns, where strategy is 'group'")
    own.ignore(*CHOSEN)
    own.end()
    return Scheme(bits, group if strategy == "group" else None, symmetric)


def _told(schemes: Iterable[Scheme]) -> list[str]:
    return [
        f"{own.bits} bits in groups of {own.group or 'all columns'}, "
        f"{'symmetric' if own.symmetric else 'with zero points'}"
        for own in schemes
    ]
