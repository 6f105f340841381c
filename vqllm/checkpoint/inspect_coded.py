"""The contents of a checkpoint of another tool, in the terms of one of ours."""

import math
from collections.abc import Iterable
from dataclasses import asdict

import yaml

from vqllm.checkpoint.format import JSON
from vqllm.checkpoint.shards import StoredTensor, natural_order
from vqllm.checkpoint.source_files import stored_tensors
from vqllm.checkpoint.stored import StoredFolder
from vqllm.checkpoint.writer import read_config
from vqllm.core.bits import BitCount
from vqllm.core.coverage import ParameterCounts
from vqllm.foreign.coded_model import CodedModel, CodedModule
from vqllm.foreign.registry import described


def inspect_coded(stored: StoredFolder) -> JSON:
    """What `inspect_checkpoint` says of a checkpoint."""
    assert stored.coded is not None
    files = stored_tensors(stored.folder)
    modules = sorted(stored.coded.modules.values(), key=lambda own: natural_order(own.name))
    bits = {own.name: _bits(own, files) for own in modules}
    options = described(read_config(stored.folder))
    total = sum(tensor.num_bytes for tensor in files.values())
    counts = _counts(stored, stored.coded)
    inside = [own for own in modules if list_of(own.name) is not None]
    weights = max(_num_weights(inside), 1)
    of_layers = sum((bits[own.name] for own in inside), BitCount())
    return {
        "folder": str(stored.folder),
        "format_version": None,
        "producer": {},
        "recipe": options,
        "recipe_yaml": yaml.safe_dump(options, sort_keys=False, allow_unicode=True),
        "linears": [_linear(own, bits[own.name]) for own in modules],
        "tied": {},
        "not_quantized": {},
        "bits_per_weight": {
            "codes only": of_layers.codes / weights,
            "all of a quantized linear": of_layers.total / weights,
            "whole checkpoint, embeddings included": 8 * total / max(counts.model, 1),
        },
        "parameters": asdict(counts),
        "num_bytes": total,
    }


def list_of(name: str) -> str | None:
    """The first list of modules that a module or tensor is in: what stands before a number."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return None if number is None else ".".join(parts[:number])


def _linear(module: CodedModule, bits: BitCount) -> JSON:
    return {
        "name": module.name,
        "rows": module.shape.rows,
        "cols": module.shape.cols,
        "codec": f"{module.format.method}: {module.describe()}",
        "spec": {},
        "bits_codes": bits.codes,
        "bits_codebook": bits.codebook,
        "bits_side": bits.side,
        "bits_per_weight": bits.total / (module.shape.rows * module.shape.cols),
        "proxy_loss": None,
    }


def _bits(module: CodedModule, files: dict[str, StoredTensor]) -> BitCount:
    """Of its stored tensors, by what they hold; its share where other linears are in them too."""
    format, found = module.format, {"codes": 0, "codebook": 0, "side": 0}
    for name in module.stored.headers:
        tables = "codebook" if name in format.tables else "side"
        kind = "codes" if name in format.codes else tables
        bits = 8 * files[f"{module.stored.name}.{name}"].num_bytes
        found[kind] += bits * module.shape.rows // module.whole.rows
    return BitCount(**found)


def _counts(stored: StoredFolder, coded: CodedModel) -> ParameterCounts:
    lists = {list_of(name) for name in coded.modules} - {None}
    quantized = {f"{name}.weight" for name in coded.modules}
    numbers = {name: math.prod(tensor.shape) for name, tensor in stored.tensors.items()}
    inside = {name: number for name, number in numbers.items() if list_of(name) in lists}
    return ParameterCounts(
        layers=sum(inside.values()),
        layers_quantized=sum(number for name, number in inside.items() if name in quantized),
        model=sum(numbers.values()),
        model_quantized=sum(numbers[name] for name in quantized),
    )


def _num_weights(modules: Iterable[CodedModule]) -> int:
    return sum(own.shape.rows * own.shape.cols for own in modules)
