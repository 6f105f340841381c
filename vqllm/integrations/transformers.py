"""Loading and saving quantized models through transformers (5.15 and newer).

`register()` makes `AutoModelForCausalLM.from_pretrained` understand checkpoints whose config.json
says `quant_method: vqllm`. On the way, before the weights are read, every quantized `nn.Linear` of
the model, which is on the meta device, gives way to an empty `VQLinear`. Its parameters carry the
names of the stored tensors, so that the ordinary loader fills them and the ordinary
`save_pretrained` writes them back.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from vqllm.checkpoint.format import QUANT_METHOD, QuantizationConfig
from vqllm.checkpoint.shards import DAMAGED, read_header
from vqllm.errors import CheckpointError
from vqllm.runtime.linear import VQLinear
from vqllm.runtime.replace import replace_linears
from vqllm_kernels import layout

LOADING_KEYS = ("dequantize",)
"""Keys that say how to load and are not part of a checkpoint."""


class VqllmConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint as transformers passes it around.

    The values of config.json are kept as they are, unknown keys included, and written back so.

    Args:
        dequantize: expand all weights to dense ones when loading; the model is then an ordinary
            one. Pass `quantization_config=VqllmConfig(dequantize=True)` to `from_pretrained`.
    """

    def __init__(self, dequantize: bool = False, **values: Any) -> None:
        self.quant_method: Any = QUANT_METHOD
        self.dequantize = bool(dequantize)
        self.values = {"quant_method": QUANT_METHOD, **values}

    def parse(self) -> QuantizationConfig:
        """The validated contents. CheckpointError for a newer format or damaged contents."""
        return QuantizationConfig.parse(self.values, "config.json")

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a config passed to `from_pretrained` may change of the checkpoint's own."""
        return {key: getattr(self, key) for key in LOADING_KEYS}

    def to_dict(self) -> dict[str, Any]:
        return deepcopy(self.values)


class VqllmQuantizer(HfQuantizer):
    """Puts `VQLinear` in place of `nn.Linear` while transformers loads a checkpoint."""

    requires_calibration = True  # a dense model cannot be quantized by passing a config to load it
    quantization_config: VqllmConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        self.quantization_config.parse()

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for path in kwargs.get("checkpoint_files") or ():
            if str(path).endswith(".safetensors"):
                read_header(Path(path))  # names a truncated file, which the loader does not
        linears = self.quantization_config.parse().linears()
        with torch.device("meta"):
            replace_linears(model, linears)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        linears = _vq_linears(model)
        _check_loaded(model, linears)
        for linear in linears.values():
            linear.requires_grad_(False)  # the loader wraps float tensors anew, with gradient
        if self.pre_quantized and self.quantization_config.dequantize:
            return self._dequantize(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        linears = _vq_linears(model)
        offloaded = [name for name, linear in linears.items() if linear.is_offloaded()]
        if offloaded:
            raise CheckpointError(
                f"{len(offloaded)} quantized linears are offloaded, so their dense weights have no "
                "place to be. Load without device_map, or write a dense folder: vqllm dequantize."
            )
        for name, linear in linears.items():
            model.set_submodule(name, _dense_linear(linear, wanted))
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> Any:
        return True

    @property
    def is_trainable(self) -> Any:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Make transformers know the format. Idempotent, also when this module is loaded twice."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, VqllmConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, VqllmQuantizer)
    config = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD]
    # Only configs of these types may carry loading attributes such as `dequantize`.
    if config not in auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (config,)


def _vq_linears(model: nn.Module) -> dict[str, VQLinear]:
    return {n: module for n, module in model.named_modules() if isinstance(module, VQLinear)}


def _dense_linear(linear: VQLinear, dtype: torch.dtype | None) -> nn.Linear:
    weight = linear.dequantize(dtype)
    dense = nn.Linear(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        device="meta",
        dtype=weight.dtype,
    )
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        dense.bias = nn.Parameter(linear.bias.to(weight.dtype), requires_grad=False)
    return dense.train(linear.training)


def _check_loaded(model: nn.Module, linears: dict[str, VQLinear]) -> None:
    """Refuse a model with packed tensors that the checkpoint does not have or has otherwise.

    transformers fills missing parameters with whatever is in memory and only logs it. Those that it
    did load carry its mark; parameters on the meta device are offloaded.
    """
    marked = any(hasattr(parameter, "_is_hf_initialized") for parameter in model.parameters())
    for name, linear in linears.items():
        loaded = {key: tensor for key, tensor in linear.packed.items() if not tensor.is_meta}
        missing = [key for key, t in loaded.items() if not hasattr(t, "_is_hf_initialized")]
        if marked and missing:
            raise CheckpointError(
                f"the checkpoint lacks tensors of {name}: {', '.join(missing)}. {DAMAGED}"
            )
        expected = {key: t for key, t in linear.spec.layout().items() if key in loaded}
        try:
            layout.check(loaded, expected, name)
        except ValueError as error:
            raise CheckpointError(f"{error}. {DAMAGED}") from error
