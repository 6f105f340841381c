"""Loading and saving quantized models through transformers (5.15 and newer).

`register()` makes `AutoModelForCausalLM.from_pretrained` understand checkpoints whose config.json
says `quant_method: vqllm`. Before the weights are read, the model is on the meta device. At that
point every quantized `nn.Linear` is replaced by an empty `VQLinear`, and a quantized `nn.Embedding`
by a `VQEmbedding`. Their parameters have the names of the stored tensors, so that the ordinary
loader fills them and the ordinary `save_pretrained` writes them back. The packed tensors of a tied
head are tied to those of the embedding in the way in which transformers ties weights.
"""

import re
from collections.abc import Collection, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from vqllm.checkpoint import checksums
from vqllm.checkpoint.format import QUANT_METHOD, QuantizationConfig
from vqllm.checkpoint.shards import DAMAGED, read_header
from vqllm.core.tensors import frozen
from vqllm.errors import CheckpointError
from vqllm.hf.claims import refuse_larger
from vqllm.hf.linear_form import from_linear_form, is_fused
from vqllm.hf.linears import before_lookup
from vqllm.hf.rules import undone_by_saving, with_linears
from vqllm.integrations.missing import refuse_missing, refuse_untied
from vqllm.integrations.module_names import found_in
from vqllm.integrations.saved_config import (
    check_loads_again,
    config_as_it_is,
    structure,
    tied_modules,
)
from vqllm.runtime.embedding import VQEmbedding
from vqllm.runtime.linear import VQLinear
from vqllm.runtime.packed import PackedModule, own_tensors
from vqllm.runtime.replace import group_inputs, replace_modules
from vqllm_kernels import layout

LOADING_KEYS = ("dequantize",)
"""Keys that say how to load and are not part of a checkpoint."""


class VqllmConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint as transformers passes it around.

    The values of config.json stay as they are, unknown keys included, and are written back so.

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
    """Puts packed modules in place of torch's while transformers loads a checkpoint."""

    requires_calibration = True  # a dense model cannot be quantized by passing a config to load it
    quantization_config: VqllmConfig
    _declared_ties: dict[str, dict[str, str]]
    """The ties that the model, and models inside it, declared before `_tie_packed` changed them, by
    the name of the model."""
    _tied: dict[str, str]
    """modules that use the tensors of another one, by full name"""
    _prefix: str = ""
    """the name of the model without its head, in front of the names of its tensors"""
    _stored: Collection[str] = ()
    """names of all tensors in the files"""
    _gone: Collection[str] = ()
    """tensors that the model has no more, because their parts are linears"""
    _own: Collection[str] = ()
    """modules that are packed, or are linears in the place of such tensors"""
    _originals: Mapping[str, nn.Module]
    """modules of transformers in whose place there are linears"""
    _rules: list[Any]
    """transformers' own rules for the model's checkpoints"""
    _structure: Mapping[str, Any] | None = None
    """what config.json said about the model's modules when it was loaded"""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        self.quantization_config.parse()

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        files = [Path(own) for own in kwargs.get("checkpoint_files") or ()]
        files = [file for file in files if file.suffix == ".safetensors"]
        # The loader itself names neither a truncated file nor a damaged one.
        stored = {name: own for file in files for name, own in read_header(file).items()}
        self._stored = set(stored)
        checksums.compare_loaded(files)
        quantization = self.quantization_config.parse()
        with torch.device("meta"):
            found = found_in(model, quantization)
            self._gone, self._own, self._originals = found.gone, found.own, found.originals
            replace_modules(model, found.specs, found.tied)
        if files:
            found_numbers = sum(own.numel for own in stored.values())
            refuse_larger(model, found_numbers, f"{files[0].parent}/config.json")
        for name, module in self._originals.items():
            # What initializes the module around experts may ask for parameters that are gone. All
            # that it has comes from the files.
            if is_fused(module):
                model.get_submodule(_module(name))._is_hf_initialized = True  # type: ignore
        self._prefix = str(model.base_model_prefix)
        self._declared_ties = _tie_packed(model, {*found.specs, *found.tied}, found.tied)
        self._tied = found.tied

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: Any = None
    ) -> list[Any]:
        """Without those that merge experts, which are linears of their own here.

        transformers gives the model, too, from 5.20 on.
        """
        self._rules = weight_conversions
        return with_linears(weight_conversions, self._gone, self._own, self._prefix)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        packed = _packed_modules(model)
        _check_loaded(model, packed)
        refuse_untied(model)
        refuse_missing(model, self._stored)
        for module in packed.values():
            module.requires_grad_(False)  # the loader wraps float tensors anew, with gradient
        if self.pre_quantized and self.quantization_config.dequantize:
            return self._dequantize(model)
        # Linears with one input share work; all others that are in memory own their tensors alone.
        groups = [group.members for group in group_inputs(model)]
        grouped = {id(member) for members in groups for member in members}
        alone = [m for m in packed.values() if id(m) not in grouped and not m.is_offloaded()]
        own_tensors([*groups, *([module] for module in alone)])
        self._structure = structure(model.config)
        for module in model.modules():
            # RWKV halves weights in place before it runs, and states to match, against overflow in
            # float16. Without both its outputs are the same.
            if hasattr(module, "_rescale_layers"):
                module._rescale_layers = _leave_layers
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        packed = _packed_modules(model)
        offloaded = [name for name, module in packed.items() if module.is_offloaded()]
        if offloaded:
            raise CheckpointError(
                f"{len(offloaded)} quantized linears are offloaded, so their dense weights have no "
                "place to be. Load without device_map, or write a dense folder: vqllm dequantize."
            )
        # Modules of their own first, so that a tied one finds the dense weight that it shares.
        tied = tied_modules(model, self._tied)
        for name, module in packed.items():
            if name not in tied:
                weight = frozen(module.dequantize(wanted))
                model.set_submodule(name, _dense(module, weight))
        for name, source in tied.items():
            model.set_submodule(name, _dense(packed[name], model.get_submodule(source).weight))
        from_linear_form(model, self._originals)
        # Saving undoes the rules that dense files would have been loaded by.
        used = [getattr(rule, "rule", rule) for rule in model._weight_conversions]
        kept = [
            n for n in model.state_dict() if n not in self._gone and _module(n) not in self._own
        ]
        model._weight_conversions = undone_by_saving(self._rules, used, kept)
        self._declare_own_ties(model)
        return model

    def _declare_own_ties(self, model: Any) -> None:
        """Let the model, and models inside it, declare the ties that they had in the beginning."""
        for name, declared in self._declared_ties.items():
            model.get_submodule(name)._tied_weights_keys = declared
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Called by `save_pretrained` before it writes anything: brings the configuration in line
        with the model's modules.

        Raises:
            CheckpointError: what would be written could not be loaded again as it is.
        """
        if not getattr(model, "_hf_peft_config_loaded", False):  # then the adapter alone is written
            self._describe(model)
        return None, {}

    def _describe(self, model: Any) -> None:
        packed = _packed_modules(model)
        if not packed:  # the same steps as for a model that is made dense at once
            self.dequantize(model)
            return
        loaded, before = self.quantization_config.parse(), self._tied
        tied = tied_modules(model, before)
        now = config_as_it_is(model, loaded, tied)
        if now is loaded and structure(model.config) == self._structure:
            return
        check_loads_again(model, now)
        if now is not loaded:
            self.quantization_config = VqllmConfig(**now.to_dict())
            model.config.quantization_config = self.quantization_config
            self._declare_own_ties(model)
            self._declared_ties = _tie_packed(model, set(packed), tied)
            self._tied = tied

    def is_serializable(self, *args: Any, **kwargs: Any) -> Any:
        return True

    @property
    def is_trainable(self) -> Any:
        """Adapters on the model can be trained; packed weights get no gradient."""
        return True

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


def _leave_layers() -> None:
    """In the place of a method that writes into weights."""


def _packed_modules(model: nn.Module) -> dict[str, PackedModule]:
    return {n: module for n, module in model.named_modules() if isinstance(module, PackedModule)}


def _dense(module: PackedModule, weight: nn.Parameter) -> nn.Module:
    """The ordinary module with this weight."""
    if isinstance(module, VQEmbedding):
        dense = _dense_embedding(module, weight)
    else:
        assert isinstance(module, VQLinear)
        dense = _dense_linear(module, weight)
    return dense.train(module.training)


def _dense_linear(linear: VQLinear, weight: nn.Parameter) -> nn.Linear:
    rows, cols = weight.shape
    dense = nn.Linear(cols, rows, linear.bias is not None, device="meta", dtype=weight.dtype)
    dense.weight = weight
    if linear.bias is not None:
        dense.bias = frozen(linear.bias.to(weight.dtype))
    return dense


def _dense_embedding(embedding: VQEmbedding, weight: nn.Parameter) -> nn.Embedding:
    if embedding.rest is None:
        rows, cols = weight.shape
        dense = nn.Embedding(rows, cols, device="meta", dtype=weight.dtype)
        dense.weight = weight
    else:
        dense = before_lookup(embedding.rest, weight)
    dense.padding_idx = embedding.padding_idx
    return dense


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _tie_packed(
    model: Any, quantized: set[str], tied: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """Declare to transformers which packed tensors are tied, in place of the dense weights.

    Otherwise it would look for the dense weights while it loads, and write tied tensors twice.

    Args:
        quantized: full names of all quantized modules.
        tied: those that use the tensors of another one.

    Returns:
        What the model, and models inside it, declared before, by their names, where it changed.
    """
    # This file is imported in the middle of the import of this class.
    from transformers import PreTrainedModel

    # `weights` are gone; `pairs` are the packed tensors of a tied module and those of its source.
    weights = {f"{name}.weight" for name in quantized}
    pairs = {
        f"{name}.{tensor}": f"{source}.{tensor}"
        for name, source in tied.items()
        for tensor in model.get_submodule(source).packed
    }
    before = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        # What a model declares without the entries about weights that are gone.
        declared: dict[str, str] = module._tied_weights_keys or {}
        own = {name.removeprefix(f"{prefix}.") for name in weights}
        now = {
            target: source
            for target, source in declared.items()
            if not any(re.search(f"^{pattern}", n) for pattern in (target, source) for n in own)
        }
        if module is model:  # these are patterns
            now |= {f"{re.escape(n)}$": f"{re.escape(source)}$" for n, source in pairs.items()}
        if now != declared:
            before[prefix] = declared
            module._tied_weights_keys = now  # of the instance, not of its class
    # The same for the list of all ties, which has full names.
    unchanged = {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if not {target, source} & weights
    }
    model.all_tied_weights_keys = unchanged | pairs
    return before


def _check_loaded(model: nn.Module, packed: dict[str, PackedModule]) -> None:
    """Refuse a model with packed tensors that the checkpoint lacks or that cannot be decoded.

    transformers leaves missing parameters uninitialised and only logs it. The parameters that it
    did load have its mark; parameters on the meta device are offloaded.
    """
    # Without a mark on any parameter, a missing mark does not mean a missing tensor.
    marked = any(hasattr(parameter, "_is_hf_initialized") for parameter in model.parameters())
    for name, module in packed.items():
        loaded = {key: tensor for key, tensor in module.packed.items() if not tensor.is_meta}
        missing = [key for key, t in loaded.items() if not hasattr(t, "_is_hf_initialized")]
        if marked and missing:
            raise CheckpointError(
                f"the checkpoint lacks tensors of {name}: {', '.join(missing)}. {DAMAGED}"
            )
        expected = {key: t for key, t in module.spec.layout().items() if key in loaded}
        try:
            layout.check(loaded, expected, name)
        except ValueError as error:
            raise CheckpointError(f"{error}. {DAMAGED}") from error
        if len(loaded) == len(module.packed) and (problem := module.spec.problem(loaded)):
            raise CheckpointError(f"{name}: {problem}. {DAMAGED}")
