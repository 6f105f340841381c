"""The files of a checkpoint beside its shards that are written anew: index and config.json."""

import json
from collections.abc import Mapping
from pathlib import Path

from vqllm.checkpoint import atomic
from vqllm.checkpoint.format import CONFIG, INDEX, JSON, QuantizationConfig
from vqllm.checkpoint.shards import read_header
from vqllm.checkpoint.side_files import without_places
from vqllm.core import json_text
from vqllm.errors import CheckpointError, ModelError
from vqllm.foreign import METHODS, without_codes
from vqllm.hf.other_quantizers import refuse_quantized
from vqllm.hf.released_formats import READABLE


def read_config(folder: Path) -> JSON:
    """The folder's config.json. ModelError when it is missing or damaged."""
    path = folder / CONFIG
    try:
        config = json_text.read(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error} Pass a folder with a model.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds {type(config).__name__}, expected a JSON object.")
    return config


def read_dense_config(folder: Path) -> JSON:
    """As `read_config`; ModelError also when the model is quantized already, unless it was released
    so or is decoded: then the configuration is that of the dense model."""
    config = read_config(folder)
    refuse_quantized(folder, config, (*READABLE, *METHODS))
    return without_codes(config)


def write_config(
    source: Path, folder: Path, staging: Path, quantization: QuantizationConfig
) -> None:
    """Write the source's config.json with `quantization_config` added and nothing else changed, but
    for local paths.

    It is copied, not regenerated: a configuration that transformers writes lacks keys that other
    versions need (without a top-level rope_theta, version 4.57 silently takes its default).
    """
    config = without_places(read_dense_config(source))
    config["quantization_config"] = quantization.to_dict()
    write_json(folder / CONFIG, config, staging)


def write_index(
    folder: Path, checksums: Mapping[str, str], staging: Path, config: JSON | None = None
) -> None:
    """Write the index of finished shards.

    Args:
        checksums: sha256 of every shard by file name.
        config: that of the model, if a part of it may be loaded by itself.

    Raises:
        CheckpointError: a tensor stands in two shards.
    """
    weight_map: dict[str, str] = {}
    total_size = 0
    for shard in sorted(checksums):
        for name, tensor in read_header(folder / shard).items():
            if name in weight_map:
                raise CheckpointError(f"{name} stands in {weight_map[name]} and in {shard}.")
            weight_map[name] = shard
            total_size += tensor.num_bytes
    metadata = {"total_size": total_size, "vqllm": {"sha256": dict(checksums)}}
    metadata |= dtype_where_missing(config or {})
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map}, staging)


def dtype_where_missing(config: JSON) -> JSON:
    """What an index says of a model's dtype: nothing, unless a part of a multimodal configuration
    does not. A text tower that is loaded by itself would then have the dtype of the first tensor of
    the first file, which may be that of a scale.
    """
    own = config.get("dtype") or config.get("torch_dtype")
    parts = [part for part in config.values() if isinstance(part, dict) and "model_type" in part]
    says = all(part.get("dtype") or part.get("torch_dtype") for part in parts)
    return {} if own is None or says else {"dtype": own}


def write_json(path: Path, values: JSON, staging: Path) -> None:
    """Write JSON with sorted keys, as transformers does."""
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    atomic.write_bytes(path, text.encode(), staging)
