"""Quantized checkpoints without a quantizer: any bits are valid codes, so random ones do.

fake = fake_checkpoint(tmp_path, "qwen2")
AutoModelForCausalLM.from_pretrained(fake.folder)
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.support.tiny import save_tiny
from vqllm.checkpoint import atomic, side_files, writer
from vqllm.checkpoint.format import QuantizationConfig, shard_name
from vqllm.codecs.entries import distinct
from vqllm.hf.linears import is_linear
from vqllm_kernels.e8p.spec import E8PSpec, E81BSpec
from vqllm_kernels.formats import FormatSpec
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.lut.spec import LutSpec
from vqllm_kernels.residual.spec import ResidualSpec
from vqllm_kernels.transforms import (
    BlockDiagonalSpec,
    CodedScaleSpec,
    HadamardSpec,
    PermutationSpec,
    ScaleSpec,
)
from vqllm_kernels.uniform.spec import UniformSpec

FORMATS: dict[str, FormatSpec] = {
    "e8p": E8PSpec(),
    "e81b": E81BSpec(),
    "lut_row": LutSpec(tile_rows=1, tile_cols=4, index_bits=6),
    "lut_col": LutSpec(tile_rows=3, tile_cols=1, index_bits=5),
    "uniform": UniformSpec(bits=3, group=16),
    "residual": ResidualSpec(stages=(E8PSpec(), E81BSpec())),
}
RECIPE = {"name": "fake", "seed": 7}


@dataclass
class FakeCheckpoint:
    """A checkpoint and what it was made of.

    `source` is the unquantized folder, `packed` the tensors of each quantized module (`linears`),
    `tied` the head that uses those of the embedding.
    """

    folder: Path
    source: Path
    linears: dict[str, LinearSpec]
    packed: dict[str, dict[str, Tensor]]
    tied: dict[str, str] = field(default_factory=dict)

    def dense_model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The source model with the decoded weights in it: what a load must equal."""
        model = AutoModelForCausalLM.from_pretrained(self.source, dtype=dtype)
        for name, spec in self.linears.items():
            W = spec.dequantize(self.packed[name]).to(dtype)
            model.get_submodule(name).weight = nn.Parameter(W, requires_grad=False)
        for name, source in self.tied.items():
            model.get_submodule(name).weight = model.get_submodule(source).weight
        return model


def linear_spec(format: FormatSpec, rows: int, cols: int) -> LinearSpec:
    """A specification with every kind of transform on both sides."""
    return LinearSpec(
        rows=rows,
        cols=cols,
        format=format,
        transforms=(
            ScaleSpec(side="in", size=cols),
            PermutationSpec(side="in", size=cols),
            BlockDiagonalSpec(side="in", size=cols, block=min(16, cols)),
            CodedScaleSpec(side="in", size=cols, bits=3),
            HadamardSpec(side="in", size=cols),
            HadamardSpec(side="out", size=rows),
            CodedScaleSpec(side="out", size=rows, bits=2),
            BlockDiagonalSpec(side="out", size=rows, block=min(16, rows)),
            ScaleSpec(side="out", size=rows),
        ),
    )


def rows_spec(format: FormatSpec, rows: int, cols: int) -> LinearSpec:
    """A specification with every kind of transform on the input side, so that rows are decoded one
    by one."""
    spec = linear_spec(format, rows, cols)
    return replace(spec, transforms=tuple(t for t in spec.transforms if t.side == "in"))


def random_packed(spec: LinearSpec, seed: int = 0) -> dict[str, Tensor]:
    """Random stored tensors of a linear, such that its weights are of the order of 0.1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _random(name.rsplit("_", 1)[-1], tensor.shape, tensor.dtype, generator)
        for name, tensor in spec.layout().items()
    }


def _random(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    if kind == "permutation":
        return torch.randperm(shape[0], generator=generator).to(dtype)
    if kind == "zero":
        return torch.full(shape, 4, dtype=dtype)
    if kind in ("scale", "levels"):
        values = 0.1 * (0.5 + torch.rand(shape, generator=generator))
        # The scale of a transform multiplies weights that have theirs already.
        return (values * 10 if math.prod(shape) > 1 and dtype == torch.float16 else values).to(
            dtype
        )
    if kind in ("blocks", "last"):
        orthogonal = torch.linalg.qr(torch.randn(shape, generator=generator)).Q
        scales = 0.5 + torch.rand(shape[-1], generator=generator)
        return (orthogonal * scales).to(dtype).contiguous()
    if kind == "codebook":
        entries = (0.1 * torch.randn(shape, generator=generator)).to(dtype)
        return distinct(entries) if entries.dtype == torch.float16 and len(shape) > 1 else entries
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max + 1, shape, generator=generator).to(dtype)


def fake_checkpoint(
    folder: Path,
    arch: str = "llama",
    format: FormatSpec | Mapping[str, FormatSpec] = FORMATS["e8p"],
    outside: FormatSpec | None = None,
    dense: Collection[str] = (),
    **overrides: Any,
) -> FakeCheckpoint:
    """Write `folder/source` and, from it, `folder/quantized`.

    Args:
        format: of every linear of the layers, or by the last part of its name; those without one
            stay dense.
        outside: that of embedding and head, which are dense without.
        dense: names of modules that stay dense.
    """
    source, output = save_tiny(folder / "source", arch, **overrides), folder / "quantized"
    staging = output / ".staging"
    staging.mkdir(parents=True)
    model = AutoModelForCausalLM.from_pretrained(source)
    stored = load_file(source / "model.safetensors")
    linears = {
        name: linear_spec(own, module.out_features, module.in_features)
        for name, module in model.named_modules()
        if is_linear(module) and _layer_of(name) is not None
        if (own := _format_of(name, format)) is not None
    }
    inside = set(linears)
    tied = {}
    if outside is not None:
        ends = {module: name for name, module in model.named_modules()}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        linears[ends[embedding]] = rows_spec(outside, *embedding.weight.shape)
        if head.weight is embedding.weight:
            tied = {ends[head]: ends[embedding]}
        else:
            linears[ends[head]] = rows_spec(outside, *head.weight.shape)
    linears = {name: spec for name, spec in linears.items() if name not in dense}
    packed = {name: random_packed(spec, i) for i, (name, spec) in enumerate(linears.items())}
    for name in (*packed, *tied):
        stored.pop(f"{name}.weight", None)
    for name, tensors in packed.items():
        stored |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    num_shards = model.config.num_hidden_layers + 1
    checksums = {}
    for i in range(num_shards):
        shard = shard_name(i + 1, num_shards)
        last = i == num_shards - 1
        own = {n: t for n, t in stored.items() if _layer_of(n) == (None if last else i)}
        checksums[shard] = atomic.write_shard(output / shard, own, staging)
    config = QuantizationConfig.build(
        linears,
        outside_layers=linears.keys() - inside,
        tied=tied,
        recipe=RECIPE,
        not_quantized={} if outside else {"lm_head": "a linear outside the decoder layers"},
        producer={"vqllm": "0"},
    )
    side_files.copy_files(source, output, staging)
    writer.write_index(output, checksums, staging)
    writer.write_config(source, output, staging, config)
    staging.rmdir()
    return FakeCheckpoint(output, source, linears, packed, tied)


def _format_of(name: str, format: FormatSpec | Mapping[str, FormatSpec]) -> FormatSpec | None:
    return format.get(name.rpartition(".")[2]) if isinstance(format, Mapping) else format


def _layer_of(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
