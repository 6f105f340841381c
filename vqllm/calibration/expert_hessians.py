"""Hessians of the experts of one layer, from the tokens that the router sends to each.

An expert's error enters the stream times the router's weight p of the token, so its Hessian is
E[p² x xᵀ] over its tokens. Most experts have few tokens, and with fewer than a few for each column
H has more noise than information: rounding then fits the calibration text. So H is shrunk towards
that of all experts together,

    H_e = (n H_own + m C H_shared) / (n + m C),      n tokens, C columns,

and an expert without tokens gets H_shared.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from vqllm.calibration.hessian import InputHessian
from vqllm.hf.experts import ExpertLinear


def merged(hessians: Iterable[InputHessian], into: InputHessian) -> InputHessian:
    """The sums of these Hessians added to another."""
    for own in hessians:
        into.total_CC += own.total_CC
        into.mass += own.mass
        into.num_tokens += own.num_tokens
    return into


def shrunk(own: InputHessian, shared: InputHessian, shrinkage: float) -> InputHessian:
    """H_e of an expert, with its own number of tokens. `shrinkage` is m; the drift is its own.

    Without any token, of its own or of others, the result has no matrix either.
    """
    if shared.mass <= 0:
        return own
    strength = shrinkage * len(own.total_CC)
    share = own.num_tokens / max(own.num_tokens + strength, 1e-30) if own.mass > 0 else 0.0
    total_CC = shared.total_CC * ((1 - share) / shared.mass)
    if share:
        total_CC.add_(own.total_CC, alpha=share / own.mass)
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
