"""What reaches the experts of a model, and second moments of it that an expert may be rounded with.

`Hessians` says by name what H is made of; `expert_hessians.py` lists the names.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

WEIGHTS = {"p²": lambda p: p * p, "p": lambda p: p, "1": lambda p: (p > 0).float()}
"""By p, the weight that the router gives a token which it sends to this expert."""


@dataclass
class Layer:
    """What the experts of one layer got: N tokens, C features, E experts."""

    experts: nn.Module
    x_NC: Tensor
    chosen_NE: Tensor
    """the weights p, 0 where a token was not routed"""
    softmax_NE: Tensor
    """over all experts"""

    def first(self, num: int) -> "Layer":
        return Layer(self.experts, self.x_NC[:num], self.chosen_NE[:num], self.softmax_NE[:num])

    def weights(self, expert: int) -> dict[str, dict[str, Tensor]]:
        """Of the expert's linears, by kind."""
        gate, up = self.experts.gate_up_proj[expert].chunk(2)
        return {
            "gate and up": {"gate": gate, "up": up},
            "down": {"down": self.experts.down_proj[expert]},
        }

    def inputs(self, kind: str, expert: int, rows: Tensor | slice = slice(None)) -> Tensor:
        """Of the expert's linears of this kind, for the tokens `rows`."""
        x_NC = self.x_NC[rows]
        if kind == "gate and up":
            return x_NC
        gate, up = self.weights(expert)["gate and up"].values()
        return self.experts.act_fn(x_NC @ gate.T) * (x_NC @ up.T)


def second_moment(x_NC: Tensor, weight_N: Tensor) -> Tensor:
    """Σ w x xᵀ / Σ w."""
    return (x_NC * weight_N[:, None]).T @ x_NC / weight_N.sum().clamp_min(1e-30)


class Hessians:
    """H of every expert of one layer for one kind of linears and one kind of weights."""

    def __init__(self, layer: Layer, kind: str, weights: str) -> None:
        self.layer, self.kind, self.of = layer, kind, WEIGHTS[weights]
        self.num_E = (layer.chosen_NE > 0).sum(0).tolist()
        self.own = [self._own(e) for e in range(len(self.num_E))]
        if kind == "down":
            self.pooled = torch.stack([H for H, n in zip(self.own, self.num_E) if n]).mean(0)
        else:
            self.pooled = second_moment(layer.x_NC, self.of(layer.chosen_NE).sum(1))

    def _own(self, expert: int) -> Tensor:
        p = self.layer.chosen_NE[:, expert]
        rows = p.nonzero().squeeze(1)
        return second_moment(self.layer.inputs(self.kind, expert, rows), self.of(p[rows]))

    def target(self, expert: int, name: str) -> Tensor:
        """What H of this expert is shrunk to."""
        base, *share = name.split(" + 1/")
        target = self._base(expert, base)
        if not share:
            return target
        size = float(target.trace()) / len(target)
        return target + (torch.eye(len(target)) * size - target) / int(share[0])

    def _base(self, expert: int, name: str) -> Tensor:
        own = self.own[expert]
        if name == "pooled":
            return self.pooled
        if name == "identity":
            return torch.eye(len(own)) * (float(own.trace()) / len(own) or 1.0)
        x_NC = self.layer.inputs(self.kind, expert)
        if name == "probability":
            return second_moment(x_NC, self.of(self.layer.softmax_NE[:, expert]))
        return second_moment(x_NC, torch.ones(len(x_NC)))

    def shrunk(self, expert: int, target: Tensor, m: float | None) -> Tensor:
        if m is None:
            return target
        n, added = self.num_E[expert], m * len(target)
        return (n * self.own[expert] + added * target) / (n + added)

    def variant(self, expert: int, target: str, m: float | None) -> Tensor:
        own = self.own[expert]
        if target == "own":  # rounded to nearest where there is none
            return own if self.num_E[expert] else torch.eye(len(own))
        return self.shrunk(expert, self.target(expert, target), m)


def capture(model: nn.Module, tokens: Tensor) -> list[Layer]:
    """What the experts of every layer get from these sequences, [sequences, length]."""
    seen: list[list[tuple[Tensor, ...]]] = [[] for _ in model.model.layers]
    hooks = []
    for layer, own in zip(model.model.layers, seen):

        def keep(_: nn.Module, args: tuple[Tensor, ...], own: list = own) -> None:
            own.append(tuple(argument.clone() for argument in args))

        hooks.append(layer.mlp.experts.register_forward_pre_hook(keep))
    for batch in tokens.split(64):
        model(batch)
    for hook in hooks:
        hook.remove()
    result = []
    for layer, own in zip(model.model.layers, seen):
        x_NC, index_NK, p_NK = (torch.cat(part) for part in zip(*own))
        softmax_NE = (x_NC @ layer.mlp.gate.weight.T).softmax(-1)
        chosen_NE = torch.zeros_like(softmax_NE).scatter_(1, index_NK, p_NK)
        result.append(Layer(layer.mlp.experts, x_NC, chosen_NE, softmax_NE))
    return result
