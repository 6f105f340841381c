"""QuIP#: codewords of lattices between two Hadamard transforms.

A linear of C inputs and R outputs; its codes are in the order of `quip_codes`:

    Qidxs        E8P12       int64 [R, C/32]
                 E8P12RVQ4B  int64 [R, C/16]    codes, then those of the residual
                 E8P12RVQ3B  int64 [R, 3·C/64]  codes, then those of E81B, a byte each
                 D4          uint8 [R, C/4]
                 HI4B1C      int32 [R, C/8]
    SU, SV       float [C], [R]                 scales with signs
    Wscale       float []                       a scale of all
    codebook_id  int64 []
    fuse_scales  float [2 or 3]                 of the parts of a fused linear
    scaleWH      float [C]                      inputs are divided by them (rescale_WH)
    A, B         float [R, rank], [rank, C]     added to the scaled codewords (lora_rank)

With the transforms Q of `sloane` and codewords V, those of a residual divided by its scale:

    W = diag(SV) Q (Wscale · V + A B) Qᵀ diag(SU / scaleWH)

In its Llama class q, k and v are one linear, `qkv_proj`, and up and gate another, `upgate_proj`.
What it is stands under `quip_params` in config.json.

Source: arXiv 2402.04396; the layout is that of Cornell-RelaxML/quip-sharp, lib/linear.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from vqllm.foreign import quip_codes
from vqllm.foreign.base import (
    FLOATS,
    CannotHoldError,
    Options,
    Packed,
    Part,
    Rows,
    Shape,
    Stored,
)
from vqllm.foreign.rotated import Around, RotatedFormat, rotation

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "upgate_proj": ("up_proj", "gate_proj")}
NOTES = ("codesz", "packsz", "idx_dtype", "train_mode", "ocs_down_size", "skip_list")
"""Options that the codebook says, or that say how the writer wants it to be run."""


@dataclass(frozen=True)
class Codebook:
    """One of QuIP#'s: its name, id and version there, and how a row of codes is stored."""

    name: str
    id: int
    version: int
    bits: int
    dtype: str
    weights: tuple[int, int]
    """weights in how many stored numbers"""
    residual_scale: float = 1.0

    @property
    def is_e8p(self) -> bool:
        return self.name.startswith("e8p")


CODEBOOKS = {
    own.name: own
    for own in (
        Codebook("e8p12", 7, 1, 2, "I64", (32, 1)),
        Codebook("e8p12rvq3b", 18, 0, 3, "I64", (64, 3), 2.04),
        Codebook("e8p12rvq4b", 17, 1, 4, "I64", (32, 2), 3.45),
        Codebook("d4", 0, 0, 2, "U8", (4, 1)),
        Codebook("hi4b1c", 10, 0, 4, "I32", (8, 1)),
    )
}


@dataclass(frozen=True)
class QuipSharp(RotatedFormat):
    """`residual_scale` is that of the second stage, `sizes` the outputs of fused linears."""

    method: ClassVar[str] = "quip#"
    marker: ClassVar[str] = "Qidxs"
    names: ClassVar[frozenset[str]] = frozenset(
        {"Qidxs", "SU", "SV", "Wscale", "codebook_id", "fuse_scales", "scaleWH", "A", "B"}
        | {"ocs_dupe_inds"}
    )
    codes: ClassVar[frozenset[str]] = frozenset({"Qidxs"})

    codebook: Codebook
    residual_scale: float
    rank: int
    rescaled: bool
    sizes: Mapping[str, tuple[int, ...]]

    @classmethod
    def from_config(cls, values: Mapping[str, Any], where: str) -> Self:
        options = Options(cls.method, values, where)
        own = CODEBOOKS[options.choice("codebook", tuple(CODEBOOKS), None)]
        options.number("codebook_version", (own.version,), 0)
        options.number("model_version", (0, 1), 1)
        options.choice("pack_out", (False,), False)
        options.choice("fused", (True,), True)
        options.choice("outlier_channel_split", (False,), False)
        rank = options.number("lora_rank", range(1 << 16), 0)
        rescaled = options.choice("rescale_WH", (True, False), False)
        scale = options.take("resid_scale_override", -1)
        if type(scale) not in (int, float):
            options.refuse("resid_scale_override", scale, "a number")
        options.ignore(*NOTES)
        options.end()
        return cls(own, scale if scale > 0 else own.residual_scale, rank, rescaled, {})

    def of_model(self, config: Mapping[str, Any]) -> Self:
        heads = config.get("num_attention_heads") or 1
        size = config.get("head_dim") or config.get("hidden_size", 0) // heads
        pairs = (config.get("num_key_value_heads") or heads) * size
        wide = config.get("intermediate_size", 0)
        sizes = {"qkv_proj": (heads * size, pairs, pairs), "upgate_proj": (wide, wide)}
        return replace(self, sizes=sizes)

    def shape(self, module: Stored) -> Shape:
        (cols,), (rows,) = module.shape("SU", 1), module.shape("SV", 1)
        what = f"{rows} x {cols} weights of {self.codebook.name.upper()}"
        weights, numbers = self.codebook.weights
        if self.codebook.is_e8p and (rows % 16 or cols % 64):
            module.refuse("SU", "multiples of 64 inputs and, in SV, of 16 outputs")
        if cols % (16 if self.codebook.name == "d4" else weights):
            module.refuse("SU", f"a multiple of {weights} inputs")
        size = (rows, cols // weights * numbers)
        module.expect("Qidxs", (self.codebook.dtype,), size, what)
        module.expect("SU", FLOATS, (cols,), what)
        module.expect("SV", FLOATS, (rows,), what)
        module.expect("Wscale", FLOATS, (), what)
        module.expect("codebook_id", ("I64", "I32"), (), what)
        if (found := int(module.read("codebook_id"))) != self.codebook.id:
            raise module.wrong(
                f"its codebook_id is {found}, and {self.codebook.name.upper()} of config.json has "
                f"{self.codebook.id}"
            )
        if self.rescaled:
            module.expect("scaleWH", FLOATS, (cols,), f"{what}, rescaled")
        if self.rank:
            module.expect("A", FLOATS, (rows, self.rank), f"{what}, a rank of {self.rank}")
            module.expect("B", FLOATS, (self.rank, cols), f"{what}, a rank of {self.rank}")
        if "ocs_dupe_inds" in module.headers:
            module.refuse("ocs_dupe_inds", "none: inputs that are split in two are not read")
        for name, features in (("SU", cols), ("SV", rows)):
            rotation(module, name, features)
        self._sizes(module, rows)
        return Shape(rows, cols, 16 if self.codebook.is_e8p else 1)

    def parts(self, module: Stored, shape: Shape) -> tuple[Part, ...]:
        sizes = self._sizes(module, shape.rows)
        if sizes is None:
            return super().parts(module, shape)
        parent, _, own = module.name.rpartition(".")
        parts, start = [], 0
        for name, size in zip(FUSED[own], sizes, strict=True):
            parts.append(Part(f"{parent}.{name}", start, start + size))
            start += size
        return tuple(parts)

    def describe(self, module: Stored, shape: Shape) -> str:
        return f"{self.codebook.name.upper()}, {self.codebook.bits} bits"

    def pack(self, module: Stored, shape: Shape) -> Packed:
        raise CannotHoldError(
            "q, k and v of QuIP#, and up and gate, are one matrix behind one Hadamard transform of "
            "all their outputs, which linears of their own cannot share"
        )

    def inner_rows(self, module: Stored, shape: Shape) -> Rows:
        codewords, scale = self._codewords(module, shape), float(module.read("Wscale"))
        added = None
        if self.rank:
            added = module.read("A").float(), module.read("B").float()

        def decode(start: int, stop: int) -> Tensor:
            weight = codewords(start, stop) * scale
            return weight if added is None else weight + added[0][start:stop] @ added[1]

        return decode

    def around(self, module: Stored, shape: Shape) -> Around:
        su_C, sv_R = module.read("SU").float(), module.read("SV").float()
        if self.rescaled:
            su_C = su_C / module.read("scaleWH").float()
        if (sizes := self._sizes(module, shape.rows)) is not None:
            scales = module.read("fuse_scales").float()
            sv_R = sv_R * scales.repeat_interleave(torch.tensor(sizes))
        sides = rotation(module, "SU", shape.cols), rotation(module, "SV", shape.rows)
        return Around(*sides, su_C, sv_R)

    def _codewords(self, module: Stored, shape: Shape) -> Callable[[int, int], Tensor]:
        """Gives those of rows `start` to `stop`, float32 [stop - start, cols]."""
        stored, name = module.read("Qidxs"), self.codebook.name
        if name == "hi4b1c":
            return lambda start, stop: quip_codes.hi4_weights(stored[start:stop])
        if name == "d4":
            codes, table = quip_codes.d4_codes(stored), quip_codes.d4_codewords()
            return lambda start, stop: table[codes[start:stop].long()].flatten(1)
        first = stored[:, : shape.cols // 32]
        second = stored[:, shape.cols // 32 :].contiguous()

        def decode(start: int, stop: int) -> Tensor:
            weight = _e8p(first[start:stop])
            if name == "e8p12rvq4b":
                weight += _e8p(second[start:stop]) / self.residual_scale
            elif name == "e8p12rvq3b":
                codes = second[start:stop].view(torch.uint8).long()
                weight += quip_codes.e81b_codewords()[codes].flatten(1) / self.residual_scale
            return weight

        return decode

    def _sizes(self, module: Stored, rows: int) -> tuple[int, ...] | None:
        """Outputs of the parts of a fused linear; None of any other."""
        if "fuse_scales" not in module.headers:
            return None
        own = module.name.rpartition(".")[2]
        sizes = self.sizes.get(own)
        if sizes is None or sum(sizes) != rows:
            module.refuse(
                "fuse_scales",
                f"none, but in {' and '.join(FUSED)} of as many outputs as config.json has heads "
                "and intermediate features",
            )
        module.expect("fuse_scales", FLOATS, (len(sizes),), f"the parts of {own}")
        return sizes


def _e8p(words: Tensor) -> Tensor:
    """Weights, float32 [R, 32 n], of words [R, n]."""
    return quip_codes.e8p_codewords()[quip_codes.e8p_codes(words).long()].flatten(1)
