"""GPTQ, as AutoGPTQ and GPTQModel write it.

A linear of C inputs and R outputs, b bits a weight, G groups of inputs:

    qweight  int32 [C·b/32, R]   the q of each output down its column, lowest bits first
    qzeros   int32 [G, R·b/32]   zero points along rows, lowest bits first
    scales   float [G, R]
    g_idx    int32 [C]           the group of each input; in no order after act-order (desc_act)

Symbols of 3 bits run over the ends of words. Version 1 of the format stores the zero points less
one; GPTQModel takes one from whole words of 2, 4 and 8 bits, so that a zero point of 0 borrows from
the next, and from single symbols of 3 bits.

Source: arXiv 2210.17323; the layout is that of AutoGPTQ's and GPTQModel's QuantLinear.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from vqllm.errors import ModelError
from vqllm.foreign.base import FLOATS, ForeignFormat, Options, Packed, Rows, Shape, Stored
from vqllm.foreign.groups import Grouped, as_bytes, regular
from vqllm_kernels.bitpack import unpack_bits

BITS = (2, 3, 4, 8)
NOTES = (
    "desc_act", "sym", "static_groups", "true_sequential", "damp_percent", "damp_auto_increment",
    "act_group_aware", "mse", "meta", "model_name_or_path", "model_file_base_name", "lm_head",
    "tokenizer", "dataset", "batch_size", "model_seqlen", "block_name_to_quantize", "backend",
    "module_name_preceding_first_block", "modules_in_block_to_quantize", "pad_token_id",
    "use_cuda_fp16", "use_exllama", "exllama_config", "disable_exllama", "max_input_length",
    "cache_block_outputs", "offload_to_disk", "offload_to_disk_path", "pack_impl", "version",
    "modules_to_not_convert", "lm_head_quantized", "quantizer", "hyb_act",
)  # fmt: skip
"""Options that say how codes were chosen, or how the writer wants them to be run."""


@dataclass(frozen=True)
class Gptq(ForeignFormat):
    """`bits` and `group` of the configuration; single modules differ where it is `dynamic`."""

    method: ClassVar[str] = "gptq"
    marker: ClassVar[str] = "qweight"
    names: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    codes: ClassVar[frozenset[str]] = frozenset({"qweight"})

    bits: int
    group: int | None
    less_one: bool
    dynamic: bool

    @classmethod
    def from_config(cls, values: Mapping[str, Any], where: str) -> Self:
        options = Options(cls.method, values, where)
        group = options.group("group_size", -1)
        formats = ("gptq", "gptq_v2")
        newer = options.choice("format", formats, "gptq")
        stored = options.choice("checkpoint_format", formats, newer)
        bits = options.number("bits", BITS)
        options.choice("is_marlin_format", (False,), False)
        options.choice("pack_dtype", ("int32", "torch.int32"), "int32")
        dynamic = bool(options.take("dynamic"))
        options.ignore(*NOTES)
        options.end()
        return cls(bits, group, stored == "gptq", dynamic)

    def shape(self, module: Stored) -> Shape:
        words, rows = module.shape("qweight", 2)
        num_groups, _ = module.shape("scales", 2)
        bits, cols = self.bits, 32 * words // self.bits
        if "g_idx" in module.headers:
            (cols,) = module.shape("g_idx", 1)
            module.expect("g_idx", ("I32", "I64"), (cols,), "its inputs")
            if self.dynamic:
                bits = 32 * words // cols
        if bits not in BITS or words * 32 != cols * bits:
            allowed = ", ".join(map(str, BITS)) if self.dynamic else str(self.bits)
            module.refuse("qweight", f"I32 [{cols} inputs · bits / 32, outputs] of {allowed} bits")
        if rows * bits % 32:
            module.refuse("qweight", f"outputs whose zero points of {bits} bits fill words of 32")
        what = f"{num_groups} groups, {rows} outputs and {bits} bits"
        module.expect("qweight", ("I32",), (words, rows), what)
        module.expect("scales", FLOATS, (num_groups, rows), what)
        module.expect("qzeros", ("I32",), (num_groups, rows * bits // 32), what)
        wanted = -(-cols // (self.group or cols))
        if num_groups != wanted and not self.dynamic:
            module.refuse("scales", f"{wanted} groups of {self.group or cols} of {cols} inputs")
        return Shape(rows, cols)

    def rows(self, module: Stored, shape: Shape) -> Rows:
        return self._grouped(module, shape).rows()

    def describe(self, module: Stored, shape: Shape) -> str:
        size = self._group(module, shape)
        groups = "one group a row" if size is None else f"groups of {size}"
        return f"{self._bits(module, shape)} bits, {groups}"

    def pack(self, module: Stored, shape: Shape) -> Packed:
        return self._grouped(module, shape).pack(self._group(module, shape))

    def _bits(self, module: Stored, shape: Shape) -> int:
        return 32 * module.headers["qweight"].shape[0] // shape.cols

    def _group(self, module: Stored, shape: Shape) -> int | None:
        num_groups = module.headers["scales"].shape[0]
        if num_groups == 1:
            return None
        regular_size = -(-shape.cols // num_groups)
        return regular_size if self.dynamic or self.group is None else self.group

    def _grouped(self, module: Stored, shape: Shape) -> Grouped:
        bits = self._bits(module, shape)
        scales = module.read("scales")
        qweight = cache(lambda: module.read("qweight"))

        def codes(start: int, stop: int) -> Tensor:
            return unpack_bits(as_bytes(qweight()[:, start:stop].T), bits, shape.cols)

        return Grouped(
            bits,
            codes,
            scales.T,
            self._zeros(module.read("qzeros"), bits, shape.rows).T,
            self._groups(module, shape, len(scales)),
        )

    def _zeros(self, qzeros: Tensor, bits: int, rows: int) -> Tensor:
        """Zero points, int32 [G, R]."""
        if self.less_one and bits != 3:
            ones = sum(1 << at for at in range(0, 32, bits))
            words = (qzeros.long() + ones) & 0xFFFFFFFF
            # As a signed number of the same 32 bits.
            qzeros = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
        zeros = unpack_bits(as_bytes(qzeros), bits, rows)
        if self.less_one and bits == 3:
            zeros = (zeros + 1) & 7
        return zeros

    def _groups(self, module: Stored, shape: Shape, num_groups: int) -> Tensor:
        if "g_idx" not in module.headers:
            return regular(shape.cols, self._group(module, shape))
        group_C = module.read("g_idx").long()
        if int(group_C.min()) < 0 or int(group_C.max()) >= num_groups:
            raise _beyond(module, group_C, num_groups)
        return group_C


def _beyond(module: Stored, group_C: Tensor, num_groups: int) -> ModelError:
    return module.wrong(
        f"its g_idx has groups {int(group_C.min())}..{int(group_C.max())}, and there are scales "
        f"for 0..{num_groups - 1}"
    )
