"""Attention of one new token to a cache of many, fast on a CPU.

Measured for one token of 128 sequences over 256 cached ones (9 heads on 3 key-value heads of 64,
bfloat16, one core of an AMD EPYC): torch's scaled_dot_product_attention, a blocked kernel made for
long queries, 31 ms; two batched products in which the heads of a group share their keys, 1.7 ms;
and transformers' cache, which copies all keys and values to append one, 1.3 ms on top.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "vqllm_decode"
GROWTH = 64
"""Tokens by which a full cache grows."""


@contextlib.contextmanager
def fast_decoding(model: PreTrainedModel) -> Iterator[Callable[[], Cache | None]]:
    """Inside, `model` computes attention by the function below in place of transformers' "sdpa".

    Yields a function that makes an empty cache for the model; its None is the model's own choice.
    Nothing changes on a GPU, or for a model with an attention of its own.
    """
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        yield lambda: None
        return
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    try:
        yield lambda: _growing_cache(model)
    finally:
        model.set_attn_implementation("sdpa")


def _growing_cache(model: PreTrainedModel) -> Cache:
    cache = DynamicCache(config=model.config)
    # Layers with a window or a state of their own keep their kind of cache.
    cache.layers = [_GrowingLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


class _GrowingLayer(DynamicLayer):
    """Keys and values [B, K, L, D] at the front of buffers [B, K, room, D] whose rest is zero."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        if begin == 0:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.key_buffer, self.value_buffer = key_states[:, :, :0], value_states[:, :, :0]
            self.is_initialized = True
        # The buffers grow by whole blocks of GROWTH tokens, so that most tokens copy nothing.
        if end > self.key_buffer.shape[-2]:
            room = -(-end // GROWTH) * GROWTH - self.key_buffer.shape[-2]
            self.key_buffer = F.pad(self.key_buffer, (0, 0, 0, room))
            self.value_buffer = F.pad(self.value_buffer, (0, 0, 0, room))
        self.key_buffer[:, :, begin:end] = key_states
        self.value_buffer[:, :, begin:end] = value_states
        self.keys, self.values = self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]
        return self.keys, self.values


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, Q, D], key and value [B, K, L, D], H a
    multiple of K; returns [B, Q, H, D]."""
    num_sequences, num_heads, num_queries, size = query.shape
    # The two options that sdpa_attention_forward acts on (one it refuses); it ignores the others.
    special = kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None
    if num_queries > 1 or attention_mask is not None or special:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    # Two products for all sequences and key-value heads at once. They run over the zeros at the end
    # of the buffers too; the scores there are cut off before the softmax.
    keys, values = _with_room(key), _with_room(value)
    scores = torch.bmm(query.reshape(len(keys), -1, size), keys.transpose(1, 2))
    scores = scores[..., : key.shape[-2]].float() * (size**-0.5 if scaling is None else scaling)
    weights = torch.softmax(scores, -1).to(value.dtype)
    weights = F.pad(weights, (0, values.shape[1] - weights.shape[-1]))
    return torch.bmm(weights, values).view(num_sequences, 1, num_heads, -1), None


def _with_room(cached: Tensor) -> Tensor:
    """[B·K, room, D] of a `_GrowingLayer`'s [B, K, L, D]; otherwise [B·K, L, D].

    torch's bfloat16 products of matrices that do not lie next to each other are up to 7 times as
    slow, so the products run over the zeros at the end too.
    """
    # The strides show whether `cached` is the front of a larger buffer, and how long that is.
    num_sequences, num_heads, length, size = cached.shape
    room = cached.stride(1) // size
    groups = num_sequences * num_heads
    whole = (num_heads * room * size, room * size, size, 1)
    is_front = cached.stride() == whole and length < room and cached.storage_offset() == 0
    if is_front and cached.untyped_storage().nbytes() == groups * room * size * cached.itemsize:
        return cached.as_strided((groups, room, size), whole[1:])
    return cached.reshape(groups, length, size)
