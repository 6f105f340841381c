"""Which modules of a model are linears that can be replaced by a quantized one."""

import copy
from collections.abc import Collection
from typing import TypeGuard

import torch
from torch import nn
from torch.nn import functional as F


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module computes x·Wᵀ + b and nothing else.

    A subclass of `nn.Linear` with a forward of its own (Falcon's computes the same in two steps,
    BitNet's rounds) is tried: a copy of the module with a weight of 2 x 3 must give what a linear
    gives. Double precision, where two orders of addition differ by 1e-16.
    """
    if type(module) is nn.Linear or not isinstance(module, nn.Linear):
        return type(module) is nn.Linear
    if type(module).forward is nn.Linear.forward:
        return True
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    weight, x = random(2, 3), random(4, 3)
    bias = None if module.bias is None else random(2)
    probe = copy.copy(module)
    values = {"weight": weight, "bias": bias}
    probe.__dict__["_parameters"] = {
        name: None if value is None else nn.Parameter(value, requires_grad=False)
        for name, value in values.items()
    }
    probe.in_features, probe.out_features = 3, 2
    try:
        # The class's forward: the instance's own may be a loader's, bound to the real weights.
        y = type(module).forward(probe, x)
        return torch.allclose(y, F.linear(x, weight, bias), rtol=0, atol=1e-12)
    except Exception:  # a forward that wants anything else is not that of a linear
        return False


def shared_modules(model: nn.Module, layers: Collection[str]) -> set[nn.Module]:
    """The modules with tensors that several layers hold, or a layer and something outside.

    They are not quantized: what a later layer feeds them is not known when the first one is.
    """
    homes: dict[nn.Module, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        home = next((layer for layer in layers if name.startswith(f"{layer}.")), "")
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own:
            homes.setdefault(module, set()).add(home)
    return {module for module, places in homes.items() if len(places) > 1}
