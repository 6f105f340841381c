"""Embeddings and output heads of vLLM with a quantized matrix, tied or not."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from vqllm.core.tensors import frozen
from vqllm.integrations.vllm import refusals
from vqllm.integrations.vllm.mode import Mode, is_packed
from vqllm.integrations.vllm.packed import PackedLinears
from vqllm.integrations.vllm.stored import default_float32, forget, take, wait_for
from vqllm.runtime.embedding import looked_up
from vqllm_kernels import slices
from vqllm_kernels.linear import LinearSpec

if TYPE_CHECKING:
    from vqllm.integrations.vllm.config import VqllmConfig


class VqllmEmbeddingMethod(QuantizeMethodBase):
    """Looks rows up, and multiplies with them, packed or decoded.

    Packed, an embedding decodes the rows that it looks up. It decodes all at load where it is a
    head as well whose product is faster so.
    """

    def __init__(self, config: "VqllmConfig", name: str, spec: LinearSpec, mode: Mode) -> None:
        """
        Args:
            name: of the packed matrix, which is the embedding's in a tied head.
        """
        self.config, self.name, self.spec = config, name, spec
        self.mode: Mode = mode
        self.dense = UnquantizedEmbeddingMethod()

    def create_weights(
        self,
        layer: VocabParallelEmbedding,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Make empty parameters for what the loader brings. ModelError for another size."""
        if (self.spec.rows, self.spec.cols) != (layer.org_vocab_size, input_size):
            raise refusals.wrong_size(self.name, self.spec, layer.org_vocab_size, input_size)
        layer.vqllm_head = isinstance(layer, ParallelLMHead)
        wait_for(layer, [self.spec], params_dtype, self.config.check_places)

    def tie_weights(self, layer: ParallelLMHead, embed_tokens: VocabParallelEmbedding) -> nn.Module:
        """Let a head use the matrix of the embedding."""
        forget(layer)
        embed_tokens.vqllm_head = True
        # Not as a submodule, whose tensors would have two names.
        object.__setattr__(layer, "vqllm_tied", embed_tokens)
        return layer

    def process_weights_after_loading(self, layer: VocabParallelEmbedding) -> None:
        """Take what was loaded. CheckpointError if some is missing or cannot be decoded."""
        parts = take(layer, [self.name])
        if parts is None:
            return
        [own] = parts
        layer.vqllm_held = None
        with default_float32():
            if self._stays_packed(layer):
                self._keep_packed(layer, own)
                return
            layer.weight = frozen(self._decoded(layer, own))
        self.dense.process_weights_after_loading(layer)

    def embedding(self, layer: VocabParallelEmbedding, input_: Tensor) -> Tensor:
        """Rows [..., features] of tokens [...], counted from the first row of this process."""
        if layer.vqllm_held is None:
            return self.dense.embedding(layer, input_)
        spec: LinearSpec = layer.vqllm_spec
        start = 0 if layer.vqllm_cut else own_rows(layer)[0]
        packed = {name: getattr(layer, f"vqllm_0_{name}") for name in spec.layout()}
        own, states = spec.split(packed)
        rows = looked_up(spec, own, states, input_.reshape(-1) + start)
        return rows.to(layer.vqllm_dtype).view(*input_.shape, spec.cols)

    def apply(self, layer: VocabParallelEmbedding, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits [..., rows of this process, padding included]."""
        layer = getattr(layer, "vqllm_tied", layer)
        if layer.vqllm_held is None:
            return self.dense.apply(layer, x, bias)
        [y] = layer.vqllm_held(layer, x)
        if not layer.vqllm_cut:
            start, stop = own_rows(layer)
            y = y[..., start:stop]
        missing = layer.num_embeddings_per_partition - y.shape[-1]
        if missing:
            y = F.pad(y, (0, missing))
        return y if bias is None else y + bias

    def _stays_packed(self, layer: VocabParallelEmbedding) -> bool:
        if not self.spec.row_wise():
            return False
        if self.mode == "auto" and not layer.vqllm_head:
            return True  # no more rows are decoded than are looked up
        return is_packed(self.mode, [self.spec], layer.vqllm_device, layer.vqllm_dtype)

    def _keep_packed(self, layer: VocabParallelEmbedding, own: dict[str, Tensor]) -> None:
        """The rows of this process, or all where tiles do not end there."""
        rows = own_rows(layer)
        is_cut = slices.ends_of_rows(self.spec, rows)
        part = slices.rows_of(self.spec, own, rows) if is_cut else (self.spec, own)
        layer.vqllm_held = PackedLinears.of(layer, [part], layer.vqllm_dtype)
        layer.vqllm_spec, layer.vqllm_cut = part[0], is_cut

    def _decoded(self, layer: VocabParallelEmbedding, own: dict[str, Tensor]) -> Tensor:
        """The dense rows of this process, and zeros in the place of its padding."""
        start, stop = own_rows(layer)
        shape = layer.num_embeddings_per_partition, self.spec.cols
        W_RC = torch.zeros(shape, dtype=layer.vqllm_dtype, device=layer.vqllm_device)
        W_RC[: stop - start] = self.spec.dequantize(own, layer.vqllm_dtype)[start:stop]
        return W_RC


def own_rows(layer: VocabParallelEmbedding) -> slices.Range:
    """The rows of this process."""
    indices = layer.shard_indices
    return indices.org_vocab_start_index, indices.org_vocab_end_index
