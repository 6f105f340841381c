"""Originals that are released in 8 or 4 bits, and read through transformers' own dequantization."""

from typing import Any

from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

READABLE = ("fp8", "mxfp4")
"""Methods of the releases that are read (DeepSeek-V3, gpt-oss). Their weights have no other source,
so quantizing them is no second quantization of something that could be had without loss."""


def dequantizer(config: Any) -> Any:
    """transformers' quantizer for a model in one of these formats, which makes dense weights of its
    tensors; None for any other model."""
    loading = dequantizing_config(config)
    return None if loading is None else AutoHfQuantizer.from_config(loading, pre_quantized=True)


def dequantizing_config(config: Any) -> Any:
    """What `from_pretrained` takes as `quantization_config` to load dense weights; None for a model
    that is in none of these formats."""
    own = getattr(config, "quantization_config", None)
    values = own if isinstance(own, dict) else own.to_dict() if own is not None else {}
    if values.get("quant_method") not in READABLE:
        return None
    loading = AutoQuantizationConfig.from_dict(dict(values))
    loading.dequantize = True
    return loading
