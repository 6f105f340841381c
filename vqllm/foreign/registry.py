"""The formats that are read, by the `quant_method` that config.json names.

QuIP# and QTIP name none: both describe themselves under `quip_params`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from vqllm.foreign.aqlm import Aqlm
from vqllm.foreign.awq import Awq
from vqllm.foreign.base import ForeignFormat
from vqllm.foreign.compressed_tensors import CompressedTensors
from vqllm.foreign.exl3 import Exl3
from vqllm.foreign.gptq import Gptq
from vqllm.foreign.qtip import Qtip
from vqllm.foreign.quip_sharp import QuipSharp
from vqllm.foreign.vptq import Vptq

FORMATS: dict[str, type[ForeignFormat]] = {
    own.method: own for own in (Gptq, Awq, CompressedTensors, Aqlm, Exl3, Vptq, QuipSharp, Qtip)
}
METHODS = tuple(FORMATS)
KEYS = ("quantization_config", "compression_config", "quip_params")
"""Keys of config.json under which a format is described; the second is of compressed-tensors, the
last of QuIP# and QTIP."""


def format_of(config: Mapping[str, Any], where: str) -> ForeignFormat | None:
    """The format of a folder; None if it is in none of these.

    Args:
        config: of its config.json.
        where: that file, for messages.

    Raises:
        ModelError: an option that is not known, or a value that the format does not have.
    """
    for place, values in _found(config):
        own = FORMATS[_method(place, values)]
        text = config.get("text_config") if place.startswith("text_config.") else config
        return own.from_config(values, f"{where}: {place}").of_model(text or {})
    return None


def described(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the format, as it stands there, and its name."""
    found = ({"quant_method": _method(*own), **own[1]} for own in _found(config))
    return next(found, {})


def without_codes(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the dense model: without what describes one of these formats."""
    kept = {}
    for key, value in config.items():
        described = key in KEYS and isinstance(value, Mapping) and _method(key, value) in FORMATS
        if key == "text_config" and isinstance(value, dict):
            kept[key] = without_codes(value)
        elif not described:
            kept[key] = value
    return kept


def _found(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The descriptions of known formats, and where they stand."""
    text = config.get("text_config")
    for inner, place in ((config, ""), (text if isinstance(text, Mapping) else {}, "text_config.")):
        for key in KEYS:
            values = inner.get(key)
            if isinstance(values, Mapping) and _method(key, values) in FORMATS:
                yield f"{place}{key}", values


def _method(key: str, values: Mapping[str, Any]) -> str:
    if key.endswith("quip_params"):
        return Qtip.method if "decode_mode" in values else QuipSharp.method
    usual = CompressedTensors.method if key.endswith("compression_config") else ""
    return str(values.get("quant_method") or usual).lower()
