"""Linears and embeddings are known by what they compute, shared modules by where they are."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqllm.hf.linears import (
    after_lookup,
    before_lookup,
    is_linear,
    shared_modules,
    why_not_embedding,
)


class TwoSteps(nn.Linear):
    """As in Falcon."""

    def forward(self, input: Tensor) -> Tensor:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    """A linear unless its scale is set."""

    def __init__(self, *args: int, scale: float = 1.0, bias: bool = True) -> None:
        super().__init__(*args, bias)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        return self.scale * F.linear(input, self.weight, self.bias)


class Rounded(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.round(), self.weight, self.bias)


class TwoInputs(nn.Linear):
    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias) + other


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_a_linear(bias: bool, device: str) -> None:
    for cls, expected in [
        (nn.Linear, True),
        (nn.modules.linear.NonDynamicallyQuantizableLinear, True),
        (TwoSteps, True),
        (Scaled, True),
        (Rounded, False),
        (TwoInputs, False),
    ]:
        module = cls(8, 4, bias=bias).to(device)
        before = dict(module.named_parameters())
        assert is_linear(module) is expected, cls
        assert all(value is before[name] for name, value in module.named_parameters())
    assert not is_linear(Scaled(8, 4, scale=2.0))
    assert not is_linear(nn.Conv1d(3, 2, 1))


def test_the_global_generator_is_left_alone() -> None:
    module = TwoSteps(3, 2)
    state = torch.get_rng_state()
    is_linear(module)
    assert torch.equal(torch.get_rng_state(), state)


class ScaledRows(nn.Embedding):
    """As in Gemma."""

    def __init__(self, *args: int, scale: float = 3.0) -> None:
        super().__init__(*args)
        self.register_buffer("factor", torch.tensor(scale), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.factor.to(self.weight.dtype)


class NormedRows(nn.Embedding):
    def __init__(self, *args: int, weight: bool = False) -> None:
        super().__init__(*args)
        self.norm = nn.RMSNorm(args[1], elementwise_affine=weight)

    def forward(self, input: Tensor) -> Tensor:
        return self.norm(super().forward(input))


class OwnRows(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return self.weight[input] + 1


class Positions(nn.Embedding):
    """As in OPT."""

    def forward(self, mask: Tensor) -> Tensor:
        return super().forward(mask.cumsum(1) + 1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_an_embedding(device: str) -> None:
    for module, reason in [
        (nn.Embedding(7, 4), None),
        (nn.Embedding(7, 4, padding_idx=1), None),
        (ScaledRows(7, 4), None),
        (NormedRows(7, 4), None),
        (NormedRows(7, 4, weight=True), "has tensors beside its weight: norm.weight"),
        (nn.Embedding(7, 4, max_norm=1.0), "max_norm"),
        (OwnRows(7, 4), "OwnRows does more than look up rows"),
        (Positions(7, 4), "Positions does more than look up rows"),
        (nn.Linear(7, 4), "Linear is no torch.nn.Embedding"),
    ]:
        module = module.to(device)
        before = dict(module.named_parameters())
        with torch.device(device):  # as in a loader
            found = why_not_embedding(module)
        assert (found is None) if reason is None else reason in str(found), module
        assert all(value is before[name] for name, value in module.named_parameters())


def test_what_an_embedding_does_after_the_look_up() -> None:
    assert after_lookup(nn.Embedding(7, 4)) is None
    module = ScaledRows(7, 4)
    rest = after_lookup(module)
    assert isinstance(rest, ScaledRows)
    rows = torch.randn(2, 4)
    for same in (rest, copy.deepcopy(rest), pickle.loads(pickle.dumps(rest))):
        assert torch.equal(same(rows), 3 * rows)
        assert not same.state_dict()
        assert same.weight.dtype == torch.float32
    assert copy.deepcopy(rest).half().weight.dtype == torch.float16
    again = before_lookup(rest, module.weight)
    assert type(again) is ScaledRows
    assert again.weight is module.weight
    tokens = torch.tensor([3, 0])
    assert torch.equal(again(tokens), module(tokens))


def test_shared_modules() -> None:
    one, everywhere, twice_inside = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    layers = nn.ModuleList(nn.ModuleDict({"own": nn.Linear(2, 2), "s": one}) for _ in range(2))
    layers[0]["a"] = layers[0]["b"] = twice_inside  # type: ignore[index]
    layers[1]["c"] = everywhere  # type: ignore[index]
    model = nn.ModuleDict({"layers": layers, "head": everywhere})
    assert shared_modules(model, ["layers.0", "layers.1"]) == {one, everywhere}
