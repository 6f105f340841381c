"""Attention of one new token to a cache of many, fast on a CPU.

torch's scaled_dot_product_attention runs a blocked kernel that is made for long queries: for one
query of 128 sequences over 256 tokens (9 heads on 3 key-value heads of 64, bfloat16, one core of
an AMD EPYC) it takes 31 ms, two batched products in which the heads of a group share their keys
take 1.7 ms.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "vqllm_decode"


@contextlib.contextmanager
def fast_decoding(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `model` attends by the function below where it would by transformers' "sdpa".

    Nothing changes on a GPU, or for a model with an attention of its own.
    """
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        yield
        return
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


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
    groups = num_sequences * key.shape[1]
    query = query.reshape(groups, -1, size)
    scores = torch.bmm(query, key.reshape(groups, -1, size).transpose(1, 2)).float()
    weights = torch.softmax(scores * (size**-0.5 if scaling is None else scaling), -1)
    mixed = torch.bmm(weights.to(value.dtype), value.reshape(groups, -1, value.shape[-1]))
    return mixed.view(num_sequences, 1, num_heads, -1), None
