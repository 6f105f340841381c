"""Experts of vLLM that are quantized one by one."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.activation import (
    ApplyMoEActivationConfig,
    apply_moe_activation,
)

from vqllm.core.tensors import frozen
from vqllm.integrations.vllm import refusals
from vqllm.integrations.vllm.mode import Mode, is_packed
from vqllm.integrations.vllm.packed_experts import PackedExperts, check_divides, divides
from vqllm.integrations.vllm.stored import WEIGHT, Stored, default_float32, forget, place_holders
from vqllm_kernels.linear import LinearSpec

if TYPE_CHECKING:
    from vqllm.integrations.vllm.config import VqllmConfig

SHARDS = ("w1", "w3", "w2")
"""gate, up, down in vLLM's words; its `w13` is gate and up, one below the other."""


PACKED: dict[str, tuple[RoutedExperts, PackedExperts]] = {}
"""Packed experts of this process by prefix. An operator finds them here: how many tokens an expert
has is not known when a graph is compiled."""


class VqllmExpertsMethod(UnquantizedFusedMoEMethod):
    """Decodes the experts at load, from when on they are vLLM's own dense ones; or keeps them
    packed."""

    def __init__(
        self,
        config: "VqllmConfig",
        layer: RoutedExperts,
        prefix: str,
        specs: Mapping[str, LinearSpec],
        mode: Mode,
    ) -> None:
        """
        Args:
            prefix: of the names of experts.
            specs: of all that are quantized, by number and name ("0.up_proj").
        """
        super().__init__(layer.moe_config)
        self.config, self.prefix, self.mode = config, prefix, mode
        linears = {
            "w1": layer.ckpt_gate_proj_name,
            "w2": layer.ckpt_down_proj_name,
            "w3": layer.ckpt_up_proj_name,
        }
        self.names = {
            (expert, shard): f"{expert}.{name}"
            for expert in range(layer.global_num_experts)
            for shard, name in linears.items()
            if name is not None
        }
        self.specs = {part: specs.get(name) for part, name in self.names.items()}
        self.is_packed = self._stays_packed(layer)

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Make empty parameters for what the loader brings."""
        self._sizes = num_experts, hidden_size, intermediate_size_per_partition
        own = {
            part: spec
            for part, spec in self.specs.items()
            if layer._map_global_expert_id_to_local_expert_id(part[0]) >= 0
        }
        if self.is_packed:
            check_divides(own, self._full_names(own), process_of(layer))
        layer.vqllm_dtype, layer.vqllm_stored = params_dtype, Stored(own)
        layer.vqllm_device = torch.empty(0).device
        layer.vqllm_parameters = []
        for prefix, shards in (("w13_", ("w1", "w3")), ("w2_", ("w2",))):
            some = Stored({part: spec for part, spec in own.items() if part[1] in shards})
            layer.vqllm_parameters += place_holders(
                layer, some.names(params_dtype), self._loader(layer), prefix
            )

    def _stays_packed(self, layer: RoutedExperts) -> bool:
        """Where that is not asked for, only on a CPU whose products with packed weights are the
        faster ones for few tokens: vLLM's own kernels for all experts at once need dense ones."""
        has_bias, device = layer.moe_config.has_bias, torch.empty(0).device
        if self.mode == "packed" and has_bias:
            raise refusals.experts_with_biases(self.prefix)
        if self.mode != "auto":
            return self.mode == "packed"
        if has_bias or device.type != "cpu" or not divides(self.specs, process_of(layer)):
            return False
        known = [spec for spec in self.specs.values() if spec is not None]
        return is_packed(self.mode, known, device, layer.moe_config.in_dtype)

    @property
    def is_monolithic(self) -> bool:
        """Whether vLLM's router is a part of the product."""
        return not self.is_packed and super().is_monolithic

    @property
    def supports_eplb(self) -> bool:
        return not self.is_packed and super().supports_eplb

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, *args: Any
    ) -> tuple[int, int]:
        if self.is_packed:
            return hidden_size, intermediate_size_per_partition
        return super().maybe_roundup_sizes(hidden_size, intermediate_size_per_partition, *args)

    def _full_names(self, parts: Iterable[tuple[int, str]]) -> dict[tuple[int, str], str]:
        return {part: f"{self.prefix}.{self.names[part]}" for part in parts}

    def _loader(self, layer: RoutedExperts) -> Any:
        def load(
            name: str,
            tensor: Tensor,
            weight_name: str = "",
            shard_id: str = "",
            expert_id: int = 0,
            return_success: bool = False,
        ) -> bool | None:
            self.config.check_places()
            own = (expert_id, shard_id) in layer.vqllm_stored.specs
            if own:
                layer.vqllm_stored.keep((expert_id, shard_id), name, tensor)
            return own if return_success else None

        return load

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Take what was loaded. CheckpointError if some is missing or cannot be decoded."""
        if hasattr(layer, "vqllm_stored"):
            with default_float32():
                (self._keep_packed if self.is_packed else self._decode)(layer)
        if not self.is_packed:
            super().process_weights_after_loading(layer)

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *args: Any,
        **others: Any,
    ) -> Any:
        """Outputs [tokens, features] of x; shared experts are run by vLLM."""
        if not self.is_packed:
            return super().apply(layer, x, topk_weights, topk_ids, *args, **others)
        return torch.ops.vqllm_vllm.experts(x, topk_weights, topk_ids, self.prefix)

    def _keep_packed(self, layer: RoutedExperts) -> None:
        stored, device = self._complete(layer), layer.vqllm_device
        tensors = {
            part: {name: tensor.to(device) for name, tensor in own.items()}
            for part, own in stored.tensors.items()
        }
        stored.tensors.clear()
        dtype, process = layer.vqllm_dtype, process_of(layer)
        held = PackedExperts.of(layer, stored.specs, tensors, dtype, process)
        PACKED[self.prefix] = layer, held

    def _complete(self, layer: RoutedExperts) -> Stored:
        stored: Stored = layer.vqllm_stored
        stored.complete(self._full_names(stored.specs))
        forget(layer)
        return stored

    def _decode(self, layer: RoutedExperts) -> None:
        stored = self._complete(layer)
        experts, hidden, inner = self._sizes
        gated = layer.ckpt_up_proj_name is not None
        device = layer.vqllm_device
        w13 = torch.zeros(
            experts, (2 if gated else 1) * inner, hidden, dtype=layer.vqllm_dtype, device=device
        )
        w2 = torch.zeros(experts, hidden, inner, dtype=layer.vqllm_dtype, device=device)
        rank = layer.moe_config.moe_parallel_config.tp_rank
        for (expert, shard), spec in stored.specs.items():
            own = {n: t.to(device) for n, t in stored.tensors.pop((expert, shard)).items()}
            W_RC = own[WEIGHT] if spec is None else spec.dequantize(own, layer.vqllm_dtype)
            _put(W_RC, shard, _local(layer, expert), (w13, w2), rank, inner)
        layer.w13_weight, layer.w2_weight = frozen(w13), frozen(w2)


def process_of(layer: RoutedExperts) -> tuple[int, int]:
    """The number of this process, and that of all that share the features of an expert."""
    parallel = layer.moe_config.moe_parallel_config
    return parallel.tp_rank, parallel.tp_size


@torch.library.custom_op("vqllm_vllm::experts", mutates_args=())
def _packed_product(x: Tensor, weights: Tensor, chosen: Tensor, prefix: str) -> Tensor:
    layer, held = PACKED[prefix]

    def activate(gate_up: Tensor) -> Tensor:
        size = gate_up.shape[-1] // (2 if layer.activation.is_gated else 1)
        inner = gate_up.new_empty(len(gate_up), size)
        config = ApplyMoEActivationConfig.from_configs(layer.moe_config, moe_quant_config(layer))
        apply_moe_activation(layer.activation, inner, gate_up, activation_config=config)
        return inner

    return held(layer, x, weights, chosen, activate, layer.apply_router_weight_on_input)


@_packed_product.register_fake
def _(x: Tensor, weights: Tensor, chosen: Tensor, prefix: str) -> Tensor:
    return torch.empty_like(x)


def moe_quant_config(layer: RoutedExperts) -> Any:
    """What vLLM knows of the activation beside its name."""
    return layer.quant_method.get_fused_moe_quant_config(layer)


def _local(layer: Any, expert: int) -> int:
    """The place of an expert in this process."""
    return layer._map_global_expert_id_to_local_expert_id(expert)


def _put(
    W_RC: Tensor, shard: str, expert: int, weights: tuple[Tensor, Tensor], rank: int, inner: int
) -> None:
    """Write the part of an expert's matrix that this process holds into vLLM's weights."""
    w13, w2 = weights
    if shard == "w2":
        own = W_RC[:, rank * inner : (rank + 1) * inner]
        w2[expert, : own.shape[0], : own.shape[1]] = own
        return
    own = W_RC[rank * inner : (rank + 1) * inner]
    start = inner if shard == "w3" else 0
    w13[expert, start : start + own.shape[0], : own.shape[1]] = own
