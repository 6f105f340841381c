"""The contents of a checkpoint: recipe, specifications, exact sizes from the stored tensors."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import yaml

from vqllm.checkpoint.format import JSON
from vqllm.checkpoint.inspect_coded import inspect_coded, list_of
from vqllm.checkpoint.reader import Checkpoint
from vqllm.checkpoint.shards import natural_order
from vqllm.checkpoint.stored import coded_folder
from vqllm.core.bits import BitCount
from vqllm.core.coverage import ParameterCounts


def inspect_checkpoint(folder: str | Path, verify: bool = True) -> JSON:
    """Describe a checkpoint in JSON values. Unless `verify`, no weights are read.

    Returns:
        `linears`, one entry a quantized linear or embedding (name, rows, cols, codec, spec, the
        bits of its stored tensors by what they hold, bits_per_weight, and proxy_loss if the run's
        report is there); `tied`, the head that has the weights of the embedding; `bits_per_weight`,
        the three figures by label; `parameters`, how many there are in the layers and in all, and
        how many of them are quantized; `not_quantized`, reasons by module; `recipe` and
        `recipe_yaml`; `producer`; `format_version`; `num_bytes` of all tensors.

    Of a checkpoint of another tool, in a format of `vqllm.foreign`, the same as far as it has it:
    the recipe is its `quantization_config`, the codec its `quant_method`.

    Raises:
        CheckpointError: not a checkpoint, a newer format, or damaged.
        ModelError: the checkpoint of another tool is damaged, or has an option that is not known.
    """
    if (coded := coded_folder(Path(folder))) is not None:
        return inspect_coded(coded)
    checkpoint = Checkpoint.open(folder, verify)
    extra = checkpoint.quantization.extra
    bits = {name: checkpoint.bits(name) for name in checkpoint.linears}
    recipe = extra.get("recipe") or {}
    return {
        "folder": str(folder),
        "format_version": checkpoint.quantization.format_version,
        "producer": extra.get("producer") or {},
        "recipe": recipe,
        "recipe_yaml": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        "linears": _linears(checkpoint, bits),
        "tied": checkpoint.quantization.tied,
        "not_quantized": extra.get("not_quantized") or {},
        "bits_per_weight": bits_per_weight(checkpoint),
        "parameters": asdict(parameter_counts(checkpoint)),
        "num_bytes": checkpoint.num_bytes,
    }


def bits_per_weight(checkpoint: Checkpoint) -> dict[str, float]:
    """The three figures, always together.

    The first two are over the weights of the quantized linears of the decoder layers, as published
    tables count them, whatever embedding and head are stored as. The third is over the parameters
    of the whole model, tied ones once, and counts every stored tensor.
    """
    # Codes and all of a linear are counted in the decoder layers only, embedding and head left out.
    inside = _in_layers(checkpoint)
    bits = sum((checkpoint.bits(name) for name in inside), BitCount())
    num_weights = _num_weights(checkpoint, inside)
    num_parameters = parameter_counts(checkpoint).model
    return {
        "codes only": bits.codes / max(num_weights, 1),
        "all of a quantized linear": bits.total / max(num_weights, 1),
        "whole checkpoint, embeddings included": 8 * checkpoint.num_bytes / max(num_parameters, 1),
    }


def parameter_counts(checkpoint: Checkpoint) -> ParameterCounts:
    """How many parameters there are, and how many of them are quantized, tied ones once.

    What is not quantized is counted in the stored tensors, so that experts of any form are in. The
    decoder layers are the list of modules that has the quantized linears.
    """
    inside = _in_layers(checkpoint)
    lists = {list_of(name) for name in inside}
    others = {name: checkpoint.tensors[name].numel for name in checkpoint.other_tensors()}
    others_in_layers = sum(numel for name, numel in others.items() if list_of(name) in lists)
    quantized = _num_weights(checkpoint, checkpoint.linears)
    in_layers = _num_weights(checkpoint, inside)
    return ParameterCounts(
        layers=in_layers + others_in_layers,
        layers_quantized=in_layers,
        model=quantized + sum(others.values()),
        model_quantized=quantized,
    )


def _in_layers(checkpoint: Checkpoint) -> list[str]:
    """The quantized linears of the decoder layers."""
    outside = set(checkpoint.quantization.outside_layers)
    return [name for name in checkpoint.linears if name not in outside]


def _num_weights(checkpoint: Checkpoint, modules: Iterable[str]) -> int:
    return sum(checkpoint.linears[name].rows * checkpoint.linears[name].cols for name in modules)


def _linears(checkpoint: Checkpoint, bits: dict[str, BitCount]) -> list[JSON]:
    records = checkpoint.records()
    return [
        {
            "name": name,
            "rows": spec.rows,
            "cols": spec.cols,
            "codec": spec.format.format_id,
            "spec": spec.to_dict(),
            "bits_codes": bits[name].codes,
            "bits_codebook": bits[name].codebook,
            "bits_side": bits[name].side,
            "bits_per_weight": bits[name].total / (spec.rows * spec.cols),
            "proxy_loss": records.get(name, {}).get("proxy_loss"),
        }
        for name, spec in sorted(
            checkpoint.linears.items(), key=lambda item: natural_order(item[0])
        )
    ]
