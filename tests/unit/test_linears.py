"""Linears are known by what they compute, and shared modules by where they are."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqllm.linears import is_linear, shared_modules


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


def test_shared_modules() -> None:
    one, everywhere, twice_inside = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    layers = nn.ModuleList(nn.ModuleDict({"own": nn.Linear(2, 2), "s": one}) for _ in range(2))
    layers[0]["a"] = layers[0]["b"] = twice_inside  # type: ignore[index]
    layers[1]["c"] = everywhere  # type: ignore[index]
    model = nn.ModuleDict({"layers": layers, "head": everywhere})
    assert shared_modules(model, ["layers.0", "layers.1"]) == {one, everywhere}
