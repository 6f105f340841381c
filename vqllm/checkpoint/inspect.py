"""The contents of a checkpoint: recipe, specifications, exact sizes from the stored tensors."""

from collections.abc import Iterable
from pathlib import Path

import yaml

from vqllm.checkpoint.format import JSON
from vqllm.checkpoint.reader import Checkpoint
from vqllm.checkpoint.shards import natural_order
from vqllm.core.bits import BitCount


def inspect_checkpoint(folder: str | Path, verify: bool = True) -> JSON:
    """Describe a checkpoint in JSON values. Unless `verify`, no weights are read.

    Returns:
        `linears`, one entry a quantized linear or embedding (name, rows, cols, codec, spec, the
        bits of its stored tensors by what they hold, bits_per_weight, and proxy_loss if the run's
        report is there); `tied`, the head that has the weights of the embedding; `bits_per_weight`,
        the three figures by label; `not_quantized`, reasons by module; `recipe` and `recipe_yaml`;
        `producer`; `format_version`; `num_bytes` of all tensors.

    Raises:
        CheckpointError: not a vqllm checkpoint, a newer format, or damaged.
    """
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
        "num_bytes": checkpoint.num_bytes,
    }


def bits_per_weight(checkpoint: Checkpoint) -> dict[str, float]:
    """The three figures, always together.

    The first two are over the weights of the quantized linears of the decoder layers, as published
    tables count them, whatever embedding and head are stored as. The third is over the parameters
    of the whole model, tied ones once, and counts every stored tensor.
    """
    # Codes and all of a linear are counted in the decoder layers only, embedding and head left out.
    outside = checkpoint.quantization.outside_layers
    inside = [name for name in checkpoint.linears if name not in outside]
    bits = sum((checkpoint.bits(name) for name in inside), BitCount())
    num_weights = _num_weights(checkpoint, inside)
    others = [checkpoint.tensors[name] for name in checkpoint.other_tensors()]
    num_parameters = _num_weights(checkpoint, checkpoint.linears)
    num_parameters += sum(tensor.numel for tensor in others)
    return {
        "codes only": bits.codes / max(num_weights, 1),
        "all of a quantized linear": bits.total / max(num_weights, 1),
        "whole checkpoint, embeddings included": 8 * checkpoint.num_bytes / max(num_parameters, 1),
    }


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
