"""Packed experts that vLLM runs. No vLLM is needed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.fake_checkpoint import FORMATS, random_packed
from vqllm.errors import ModelError
from vqllm.integrations.vllm import refusals
from vqllm.integrations.vllm.packed_experts import PackedExperts, check_divides, divides
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.transforms import HadamardSpec

HIDDEN, INNER, NUM = 64, 32, 3
SIZES = {"w1": (INNER, HIDDEN), "w3": (INNER, HIDDEN), "w2": (HIDDEN, INNER)}
Part = tuple[int, str]


def specs(block: int | None = 16, gated: bool = True) -> dict[Part, LinearSpec | None]:
    """Of all experts; gate of the last one is dense."""
    found: dict[Part, LinearSpec | None] = {}
    for part in [(n, shard) for n in range(NUM) for shard in SIZES if gated or shard != "w3"]:
        rows, cols = SIZES[part[1]]
        hadamards = (
            HadamardSpec(side="in", size=cols, block=block),
            HadamardSpec(side="out", size=rows, block=block),
        )
        found[part] = LinearSpec(rows=rows, cols=cols, format=FORMATS["e8p"], transforms=hadamards)
    return found | {(NUM - 1, "w1"): None}


def tensors_of(specs: dict[Part, LinearSpec | None]) -> dict[Part, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return {
        part: random_packed(spec, seed=i)
        if spec is not None
        else {"weight": torch.randn(SIZES[part[1]], generator=generator)}
        for i, (part, spec) in enumerate(specs.items())
    }


def activate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def outputs(experts: dict[Part, LinearSpec | None], *given: Any, weigh_input: bool) -> Tensor:
    """What the decoded experts give, token by token."""
    tensors, x, weights, chosen = given
    W = {
        part: tensors[part]["weight"] if spec is None else spec.dequantize(tensors[part])
        for part, spec in experts.items()
    }
    y = torch.zeros_like(x)
    for token, row in enumerate(x):
        for weight, number in zip(weights[token], chosen[token].tolist()):
            own = row * weight if weigh_input else row
            inner = F.silu(W[number, "w1"] @ own) * (W[number, "w3"] @ own)
            y[token] += W[number, "w2"] @ inner * (1 if weigh_input else weight)
    return y


@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize("weigh_input", [False, True])
def test_the_sum_over_processes_is_that_of_decoded_experts(num: int, weigh_input: bool) -> None:
    experts = specs()
    tensors = tensors_of(experts)
    generator = torch.Generator().manual_seed(0)
    x = 0.1 * torch.randn(5, HIDDEN, generator=generator)
    weights = torch.rand(5, 2, generator=generator)
    chosen = torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0], [2, 0]])  # none of 1
    y = torch.zeros_like(x)
    for rank in range(num):
        layer = nn.Module()
        held = PackedExperts.of(layer, experts, tensors, torch.float32, (rank, num))
        y += held(layer, x, weights, chosen, activate, weigh_input)
    want = outputs(experts, tensors, x, weights, chosen, weigh_input=weigh_input)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


def test_experts_of_other_processes_are_left_out() -> None:
    own = {part: spec for part, spec in specs().items() if part[0] != 1}
    layer = nn.Module()
    held = PackedExperts.of(layer, own, tensors_of(own), torch.float32, (0, 1))
    x = torch.randn(2, HIDDEN)
    chosen, weights = torch.tensor([[1], [0]]), torch.ones(2, 1)
    y = held(layer, x, weights, chosen, activate)
    assert not y[0].any()
    assert y[1].any()
    empty = held(layer, x[:0], weights[:0], chosen[:0], activate)
    assert empty.shape == (0, HIDDEN)


def test_what_does_not_divide_is_refused() -> None:
    names = {part: f"experts.{part[0]}.{part[1]}" for part in specs()}
    check_divides(specs(), names, (0, 2))
    check_divides(specs(block=None), names, (0, 1))
    assert divides(specs(), (0, 2))
    assert not divides(specs(block=None), (0, 2))
    with pytest.raises(ModelError, match=r"experts\.0\.w1 cannot be divided while it is packed"):
        check_divides(specs(block=None), names, (1, 2))
    message = str(refusals.undivided_expert("a", 4))
    assert "--set tensor_parallel=4" in message
    assert "allowed are auto, decoded" in str(refusals.experts_with_biases("mlp.experts"))
