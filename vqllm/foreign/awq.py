"""AWQ in the order of its GEMM kernel, as AutoAWQ writes it.

A linear of C inputs and R outputs, 4 bits a weight, G groups of inputs:

    qweight  int32 [C, R/8]   the q of eight outputs in a word
    qzeros   int32 [G, R/8]   zero points, in the same order
    scales   float16 [G, R]

The nibbles of a word, lowest first, belong to outputs 0, 2, 4, 6, 1, 3, 5, 7 of its eight.

Source: arXiv 2306.00978; the layout is that of AutoAWQ's WQLinear_GEMM.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from vqllm.foreign.base import FLOATS, ForeignFormat, Options, Packed, Rows, Shape, Stored
from vqllm.foreign.groups import Grouped, regular

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that each nibble of a word belongs to."""
NOTES = (
    "modules_to_not_convert", "backend", "fuse_max_seq_len", "do_fuse", "modules_to_fuse",
    "exllama_config", "lm_head", "meta", "desc_act", "sym", "dataset", "model_name_or_path",
    "duo_scaling", "damp_percent", "true_sequential", "pack_dtype", "checkpoint_format",
)  # fmt: skip
"""Options that say nothing about the stored weights."""


@dataclass(frozen=True)
class Awq(ForeignFormat):
    """Groups of `group` inputs; None is all of them."""

    method: ClassVar[str] = "awq"
    marker: ClassVar[str] = "qweight"
    names: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales"})
    codes: ClassVar[frozenset[str]] = frozenset({"qweight"})

    group: int | None

    @classmethod
    def from_config(cls, values: Mapping[str, Any], where: str) -> Self:
        options = Options(cls.method, values, where)
        for key in ("bits", "w_bit"):
            options.number(key, (4,), 4)
        group = options.take("q_group_size")
        group = options.group("group_size", group or 128)
        version = options.choice("version", ("gemm", "exllama"), "gemm")
        options.choice("format", ("gemm",), "gemm" if version == "exllama" else version)
        options.choice("zero_point", (True,), True)
        options.ignore(*NOTES)
        options.end()
        return cls(group)

    def shape(self, module: Stored) -> Shape:
        cols, words = module.shape("qweight", 2)
        rows, num_groups = 8 * words, -(-cols // (self.group or cols))
        what = f"{cols} inputs in groups of {self.group or cols}, and {rows} outputs"
        module.expect("qweight", ("I32",), (cols, words), what)
        module.expect("qzeros", ("I32",), (num_groups, words), what)
        module.expect("scales", FLOATS, (num_groups, rows), what)
        return Shape(rows, cols, unit=8)

    def rows(self, module: Stored, shape: Shape) -> Rows:
        return self._grouped(module, shape).rows()

    def describe(self, module: Stored, shape: Shape) -> str:
        return f"4 bits, groups of {self.group or shape.cols}"

    def pack(self, module: Stored, shape: Shape) -> Packed:
        return self._grouped(module, shape).pack(self.group)

    def _grouped(self, module: Stored, shape: Shape) -> Grouped:
        qweight = cache(lambda: module.read("qweight"))

        def codes(start: int, stop: int) -> Tensor:
            first, last = start // 8, -(-stop // 8)
            return _nibbles(qweight()[:, first:last])[:, start - 8 * first :][:, : stop - start].T

        return Grouped(
            4,
            codes,
            module.read("scales").T,
            _nibbles(module.read("qzeros")).T,
            regular(shape.cols, self.group),
        )


def _nibbles(words: Tensor) -> Tensor:
    """The eight symbols of each word, int32 [n, 8 m] from [n, m], by output."""
    place = torch.tensor([4 * ORDER.index(output) for output in range(8)], dtype=torch.int32)
    return ((words[:, :, None] >> place) & 15).flatten(1)
