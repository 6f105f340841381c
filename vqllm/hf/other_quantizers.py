"""Which method a model was quantized by, as its folder says in one of the usual ways."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vqllm.core import json_text
from vqllm.errors import ModelError

CONFIGS = {"quantization_config": None, "compression_config": "compressed-tensors"}
"""Keys of config.json that describe a quantization, and whose they are if they do not say so."""
FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
    "quantization_config.json": "exl3",
    "quanto_qconfig.json": "quanto",
    "quantization_map.json": "quanto",
}
"""Files of quantizers that leave config.json as it was."""
ORIGINAL = "Pass the original model, whose weights are in bfloat16, float16 or float32."


def refuse_quantized(
    folder: Path, config: Mapping[str, Any], readable: Collection[str] = ()
) -> None:
    """Raise ModelError for a model that config.json says is quantized.

    Args:
        config: of the folder's config.json.
        readable: methods whose weights can be read, so that they pass.
    """
    method, place = _in_config(config)
    if method is None or method in readable:
        return
    advice = ORIGINAL
    if method == "vqllm":
        advice = "Quantize the original model, or write a dense copy first: vqllm dequantize."
    raise ModelError(f"{folder} is already quantized ({method!r}), as {place} says. {advice}")


def method_of(folder: Path, config: Mapping[str, Any]) -> tuple[str, str] | None:
    """The method that a folder's model was quantized by, and where that is said; None if it is said
    nowhere. A file of a quantizer may lie beside ordinary weights."""
    method, place = _in_config(config)
    if method is not None:
        return method, place
    for name, usual in FILES.items():
        if (folder / name).is_file():
            return _named(_read(folder / name)) or usual, name
    return None


def is_of_mlx(config: Mapping[str, Any]) -> bool:
    """Whether config.json is of MLX, whose quantization_config transformers cannot use."""
    return _in_config(config)[0] == "mlx"


def _in_config(config: Mapping[str, Any]) -> tuple[str | None, str]:
    """The method that config.json names, for the whole model or its language model, and where."""
    text = config.get("text_config")
    for values, of in ((config, ""), (text, "text_config.")):
        if not isinstance(values, Mapping):
            continue
        mlx = "mlx" if isinstance(values.get("quantization"), Mapping) else None
        for key, usual in CONFIGS.items():
            own = values.get(key)
            if isinstance(own, Mapping) and own:
                return _named(own) or usual or mlx or "unknown", f"{of}{key} in config.json"
        if mlx:
            return mlx, f"{of}quantization in config.json"
    return None, ""


def _named(values: Mapping[str, Any]) -> str | None:
    """The method that a description of a quantization names, in the words of several programs."""
    inner = values.get("quantization")
    places = [values, inner] if isinstance(inner, Mapping) else [values]
    for place in places:
        for key in ("quant_method", "quant_algo"):
            if isinstance(place.get(key), str):
                return place[key].lower()
    if values.get("load_in_4bit") or values.get("load_in_8bit"):
        return "bitsandbytes"
    return None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        values = json_text.read(path)
    except (OSError, ValueError):
        return {}  # its name says enough
    return values if isinstance(values, dict) else {}
