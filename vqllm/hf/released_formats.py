"""Originals that are released in 8 or 4 bits, and read through transformers' own dequantization."""

from typing import Any

from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

READABLE = ("fp8", "mxfp4")
"""Methods of the releases that are read (DeepSeek-V3, gpt-oss). Their weights have no other source,
so quantizing them is no second quantization of something that could be had without loss."""


def method_of(config: Any) -> str | None:
    """The `quant_method` of a configuration, as transformers or config.json has it; None for a
    model in an ordinary dtype."""
    own = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(config, dict):
        own = getattr(config, "quantization_config", None)
    if own is None:
        return None
    method = own.get("quant_method") if isinstance(own, dict) else own.quant_method
    return str(getattr(method, "value", method))


def dequantizer(config: Any) -> Any:
    """transformers' quantizer for a model in one of these formats, which makes dense weights of its
    tensors; None for any other model."""
    loading = dequantizing_config(config)
    return None if loading is None else AutoHfQuantizer.from_config(loading, pre_quantized=True)


def dequantizing_config(config: Any) -> Any:
    """What `from_pretrained` takes as `quantization_config` to load dense weights; None for a model
    that is in none of these formats."""
    if method_of(config) not in READABLE:
        return None
    own = config.quantization_config
    values = dict(own) if isinstance(own, dict) else own.to_dict()
    loading = AutoQuantizationConfig.from_dict(values)
    loading.dequantize = True
    return loading
