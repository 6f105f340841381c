"""What vLLM asks of a quantization method: which module is quantized, and how it is run."""

from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from vqllm.integrations.vllm import refusals
from vqllm.integrations.vllm.embedding import VqllmEmbeddingMethod
from vqllm.integrations.vllm.experts import RoutedExperts, VqllmExpertsMethod
from vqllm.integrations.vllm.linear import VqllmLinearMethod
from vqllm.integrations.vllm.mode import Mode, requested
from vqllm.integrations.vllm.names import Modules


class VqllmConfig(QuantizationConfig):
    """A `quantization_config` of vqllm as vLLM passes it around."""

    def __init__(self, modules: Modules) -> None:
        super().__init__()
        self.modules = modules
        self._is_checked = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "VqllmConfig":
        """From config.json. CheckpointError for a newer format or damaged contents."""
        return cls(Modules.parse(config))

    def get_name(self) -> Any:
        return "vqllm"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        mapper = hf_to_vllm_mapper
        if hasattr(mapper, "get_rename_mapper"):  # without the rules that fuse linears
            mapper = mapper.get_rename_mapper()
        self.modules.rename(getattr(mapper, "map_name", None) or mapper._map_name)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a module is run; None leaves it to vLLM.

        Raises:
            ModelError: LoRA, or a wrong `vqllm_weights`.
        """
        config = get_current_vllm_config()
        if config.lora_config is not None:
            raise refusals.lora()
        wanted = requested(config.additional_config)
        if isinstance(layer, LinearBase):
            return self._of_linear(prefix, wanted)
        if isinstance(layer, VocabParallelEmbedding):
            return self._of_embedding(layer, prefix, wanted)
        if isinstance(layer, RoutedExperts):
            specs = self.modules.experts(prefix)
            return VqllmExpertsMethod(self, layer, prefix, specs, wanted) if specs else None
        return None

    def check_places(self) -> None:
        """Raise ModelError if the model has no module for some quantized ones. Called before the
        first tensor is kept, when all modules have been made."""
        if self._is_checked:
            return
        self._is_checked = True
        left = self.modules.not_asked()
        if left and get_pp_group().world_size == 1:  # else another process may have them
            architectures = get_architectures()
            raise refusals.no_place(left, architectures)

    def _of_linear(self, prefix: str, wanted: Mode) -> QuantizeMethodBase:
        names = self.modules.parts(prefix, self.packed_modules_mapping)
        specs = self.modules.quantized(names)
        if all(spec is None for spec in specs):
            return UnquantizedLinearMethod()
        return VqllmLinearMethod(self, names, specs, wanted)

    def _of_embedding(
        self, layer: VocabParallelEmbedding, prefix: str, wanted: Mode
    ) -> QuantizeMethodBase:
        if isinstance(layer, ParallelLMHead):
            name = self.modules.head(prefix)
        else:
            name = self.modules.embedding(prefix, layer.org_vocab_size, layer.embedding_dim)
        if name is None:
            return UnquantizedEmbeddingMethod()
        return VqllmEmbeddingMethod(self, name, self.modules.specs[name], wanted)


def get_architectures() -> str:
    """Of the model that is being loaded, for messages."""
    model = get_current_vllm_config().model_config
    return ", ".join(model.architectures) if model is not None else "model"
