"""Hessians of the experts of one layer, from the tokens that the router sends to each.

An expert's error enters the stream times the router's weight p of the token, so its Hessian is
E[p² x xᵀ] over its tokens. Most experts have few tokens, and with fewer than a few for each column
H has more noise than information: rounding then fits the calibration text. So H is shrunk,

    H_e = (n H_own + m C T) / (n + m C),      n tokens, C columns.

What all experts read is the same stream, so for their first linears T is 3/4 of the Hessian of all
of them together and 1/4 of its mean diagonal times I. What their last linears read are features of
each expert alone, which have nothing to do with those of the others: there T is the mean diagonal
of their own H times I, with half of m. An expert without tokens gets T alone.

Error on held-out tokens of e8p at 2 bits, experts of 128 x 128 of a trained mixture with 64 tokens
each on average (`eval/expert_hessians.py`): first linears .0233 with their own H and m = 0, .0202
with that of all as T, .0179 so; last ones .0261 with their own, .0222 so.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from vqllm.calibration.hessian import InputGroup, InputHessian
from vqllm.hf.experts import ExpertLinear

SMOOTH = 0.25
"""The part of I in what first linears are shrunk towards; 0 and 1/2 gave .0202 and .0182."""


def merged(hessians: Iterable[InputHessian], into: InputHessian) -> InputHessian:
    """The sums of these Hessians added to another."""
    for own in hessians:
        into.total_CC += own.total_CC
        into.mass += own.mass
        into.num_tokens += own.num_tokens
    return into


def shrunk(own: InputHessian, shared: InputHessian | None, shrinkage: float) -> InputHessian:
    """H_e of an expert, with its own number of tokens and drift.

    Args:
        own: of its tokens alone; its sum may be overwritten.
        shared: that of all experts that read the same; None where each reads features of its own.
        shrinkage: m.
    """
    if shared is not None and not shared.is_known:
        return own  # no token came to any of them
    size, share = len(own.total_CC), 0.0
    strength = shrinkage * size * (1.0 if shared is not None else 0.5)
    if own.is_known:
        share = own.num_tokens / max(own.num_tokens + strength, 1e-30)
    # In place, since H of an expert's last linear is large: 0.8 GB for 14336 features.
    mean = float(own.total_CC.diagonal().mean()) / own.mass if own.is_known else 1.0
    total_CC = own.total_CC.mul_(share / own.mass if share else 0.0)
    if shared is not None:
        mean = SMOOTH * float(shared.total_CC.diagonal().mean()) / shared.mass
        total_CC.add_(shared.total_CC, alpha=(1 - share) * (1 - SMOOTH) / shared.mass)
    total_CC.diagonal().add_(mean * (1 - share))
    return InputHessian(total_CC, own.num_tokens, 1.0, own.drift)


class LayerExperts:
    """The experts of one layer, and the Hessians that they have in common.

    Attributes:
        linears: of the experts, by full name; none in a layer without experts.
    """

    def __init__(
        self, linears: Mapping[str, ExpertLinear] | None = None, shrinkage: float = 0.0
    ) -> None:
        self.linears = linears or {}
        self._shrinkage = shrinkage
        self._sides: dict[str, dict[str, list[str]]] = {}
        """linears by side and expert, in order"""
        for name, own in self.linears.items():
            self._sides.setdefault(own.side, {}).setdefault(own.expert, []).append(name)
        self._shared: dict[str, InputHessian] = {}
        """Hessians of all experts together, by side"""
        self._complete: set[str] = set()
        """sides of which that is measured"""

    def grouped(self, groups: Iterable[InputGroup]) -> list[InputGroup]:
        """The groups with those of experts replaced by what their module says, all of one side
        where the first of them ran: whether tokens reached them does not matter."""
        found: list[InputGroup] = []
        done: set[str] = set()
        for group in groups:
            alone = tuple(name for name in group.names if name not in self.linears)
            if alone:
                found.append(InputGroup(alone))
            own = (self.linears[name].side for name in group.names if name not in alone)
            for side in dict.fromkeys(own):
                if side not in done:
                    done.add(side)
                    experts = self._sides[side].values()
                    found += [InputGroup(tuple(names), side) for names in experts]
        return found

    def weights(self, name: str, x: Tensor) -> Tensor | None:
        """p² of the tokens that a linear runs on now; None for one of no expert, or where the
        router's weights are in its input x itself."""
        routed = self.linears[name].owner.routed if name in self.linears else None
        if routed is None or len(routed.weight_N) != len(x):
            return None
        return routed.weight_N.detach().float().square()

    def others(
        self, groups: Iterable[InputGroup], linears: Mapping[str, nn.Linear], device: torch.device
    ) -> dict[str, InputHessian]:
        """For every expert that is not among the groups but has its part in what they share, one
        of its linears, and the shared Hessian, empty; none where that is measured already."""
        measured = {name for group in groups for name in group.names}
        others: dict[str, InputHessian] = {}
        for side in dict.fromkeys(group.side for group in groups if group.side):
            first = next(iter(self._sides[side].values()))[0]
            if side in self._shared or not self.linears[first].reads_the_stream:
                continue
            shared = InputHessian.empty(linears[first].in_features, device)
            self._shared[side] = shared
            for names in self._sides[side].values():
                if names[0] not in measured:
                    others[names[0]] = shared
        return others

    def share(self, hessians: Mapping[InputGroup, InputHessian]) -> None:
        """Add what the groups' experts have to what all share, the first time it is measured."""
        for side in self._shared.keys() - self._complete:
            own = (hessian for group, hessian in hessians.items() if group.side == side)
            merged(own, self._shared[side])
            self._complete.add(side)

    def shrunk(self, group: InputGroup, hessian: InputHessian) -> InputHessian:
        """The Hessian that a group is rounded with; its own where it is not of an expert."""
        if group.side is None:
            return hessian
        # Where no token came to any expert, all their linears stay as they are.
        first = self._shared.get(group.side.replace(" output", " input"))
        if first is not None and not first.is_known:
            return hessian
        return shrunk(hessian, self._shared.get(group.side), self._shrinkage)
