"""What comes out of quantizing an input group, for every shipped recipe."""

import pytest
import torch
from safetensors.torch import save

from vqllm import recipes
from vqllm.quantization import linear as group

SLOW = {"qtip-2bit", "aqlm-2bit", "additive-3bit", "vptq-2bit", "vptq-3bit", "leech-3bit"}
"""Of several recipes with the same parts one is enough where coding takes seconds."""


@pytest.mark.parametrize("name", sorted(recipes.available().keys() - SLOW))
def test_tensors_of_a_layer_go_into_one_file(name: str) -> None:
    """A file takes no tensors that share memory: none of a table or of the input's transforms."""
    generator = torch.Generator().manual_seed(0)
    W = {linear: torch.randn(16, 32, generator=generator) for linear in ("q", "k")}
    x_NC = torch.randn(256, 32, generator=generator)
    statistics = group.Statistics(x_NC.T @ x_NC / 256, 256)
    done = group.quantize_group(W, statistics, recipes.load(name))
    tensors = {f"{q.name}.{key}": tensor for q in done for key, tensor in q.tensors.items()}
    assert len(save(tensors)) > sum(tensor.nbytes for tensor in tensors.values())
    for quantized in done:
        assert torch.equal(quantized.spec.dequantize(quantized.tensors), quantized.W_hat_RC)
