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

from torch import Tensor

from vqllm.calibration.hessian import InputHessian
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


def routed_weights(linear: ExpertLinear, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The numbers of the tokens that an expert's linear runs on now, among those of the batch, and
    p² of each; None where the router's weights are in the input itself."""
    routed = linear.owner.routed
    if routed is None or len(routed.token_N) != len(x):
        return None
    return routed.token_N, routed.weight_N.detach().float().square()


def sides(linears: Mapping[str, ExpertLinear]) -> dict[str, dict[str, list[str]]]:
    """Linears by the input that all experts share and by expert, in order."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, own in linears.items():
        found.setdefault(own.side, {}).setdefault(own.expert, []).append(name)
    return found
