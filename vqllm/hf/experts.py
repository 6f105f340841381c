"""Experts of a mixture as ordinary linears.

transformers keeps the matrices of all experts of a layer in parameters of three dimensions. Here
they are modules with names of their own, `experts.17.gate_proj`, so that each is a linear like any
other: it has a Hessian, a codec, a record and a place in the checkpoint. What they compute together
stays what transformers' "eager" implementation computes, in the same order of additions.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Routed:
    """The tokens that the running expert has."""

    token_N: Tensor
    """their numbers among all, in the order in which they came"""
    weight_N: Tensor
    """what the router multiplies its outputs by"""


class LinearExperts(nn.Module):
    """Experts as children "0" to "E-1", each with its linears.

    Takes the place of an experts module of transformers: called with hidden states [T, C], the
    experts chosen for each token [T, K] and their weights [T, K], it returns [T, C].

    Attributes:
        num_experts: E. An index of E or more means no expert.
        routed: while an expert runs, its tokens; None where they are not known here.
    """

    act_fn: Any
    post_expert_norm: Any
    output_size: int

    def __init__(self, like: nn.Module, num_experts: int) -> None:
        """Args:
        like: the module whose place it takes, for activation functions and other settings.
        """
        super().__init__()
        # Settings that the original's gate reads: limits, activation functions, the config.
        for name, value in vars(like).items():
            if not name.startswith("_") and name not in self.__dict__:
                self.__dict__[name] = value
        for name, child in like.named_children():
            self.add_module(name, child)
        self._like = type(like)
        self.num_experts = num_experts
        self.routed: Routed | None = None

    def expert(self, index: int) -> nn.Module:
        """The linears of an expert."""
        return self._modules[str(index)]  # type: ignore[return-value]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for index, token_N, choice_N in _routed(top_k_index, self.num_experts):
            weight_N = top_k_weights[token_N, choice_N]
            self.routed = Routed(token_N, weight_N)
            try:
                y_NC = self._run(self.expert(index), hidden_states[token_N])
            finally:
                self.routed = None
            output.index_add_(0, token_N, (y_NC * weight_N[:, None]).to(output.dtype))
        return output

    def _run(self, expert: Any, x_NC: Tensor) -> Tensor:
        """An expert's output for its tokens, before the router's weight."""
        if hasattr(expert, "gate_up_proj"):
            h_NI = self._gate(expert.gate_up_proj(x_NC))
        elif hasattr(expert, "gate_proj"):
            h_NI = self._gate(torch.cat([expert.gate_proj(x_NC), expert.up_proj(x_NC)], -1))
        else:
            h_NI = self.act_fn(expert.up_proj(x_NC))
        y_NC = expert.down_proj(h_NI)
        return self.post_expert_norm(y_NC) if getattr(self, "has_post_expert_norm", False) else y_NC

    def _gate(self, gate_up: Tensor) -> Tensor:
        """The class's own gate: [.., 2 I] -> [.., I]; the usual one where it has none as such."""
        if own := getattr(self._like, "_apply_gate", None):
            return own(self, gate_up)
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up


class ExpertsAndIdentity(LinearExperts):
    """Experts of which those from E on give back their input (LongCat)."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = super().forward(hidden_states, top_k_index, top_k_weights)
        beyond_TK = (top_k_index >= self.num_experts).to(top_k_weights.dtype)
        weight_T1 = (top_k_weights * beyond_TK).sum(-1, keepdim=True)
        return output + (hidden_states * weight_T1).to(output.dtype)


class StackedExperts(LinearExperts):
    """Experts that get all tokens one behind the other, once for each expert, multiplied by the
    router's weights; those of other experts are zero (Llama 4). [E T, C] -> [E T, C]."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        x_ETC = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])
        output = torch.zeros_like(x_ETC)
        for index, x_TC in enumerate(x_ETC):
            token_N = x_TC.any(-1).nonzero()[:, 0]
            if len(token_N):
                output[index, token_N] = self._run(self.expert(index), x_TC[token_N])
        return output.view(-1, output.shape[-1])


class ReshapedExperts(LinearExperts):
    """Experts that take states of any shape and return [S, -1, C], S the first axis of what they
    took (DBRX)."""

    def __init__(self, like: Any, num_experts: int) -> None:
        super().__init__(like, num_experts)
        del self.mlp  # holds the matrices
        self.act_fn = like.mlp.activation_fn

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x_TC = hidden_states.reshape(-1, hidden_states.shape[-1])
        y_TC = super().forward(x_TC, top_k_index, top_k_weights)
        return y_TC.view(len(hidden_states), -1, y_TC.shape[-1])


class SortedExperts(LinearExperts):
    """One matrix an expert, as children "0" to "E-1", for tokens that come sorted by expert
    (JetMoE): [T, C] and the number of tokens of each expert -> [T, R]."""

    def forward(self, inputs: Tensor, expert_size: Any) -> Tensor:  # type: ignore[override]
        sizes = expert_size.tolist() if isinstance(expert_size, Tensor) else list(expert_size)
        outputs = [
            self.expert(index)(x_NC) for index, x_NC in enumerate(inputs.split(sizes)) if len(x_NC)
        ]
        return torch.cat(outputs) if outputs else inputs.new_zeros(0, self.output_size)


def _routed(top_k_index: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For every expert that has tokens, in order: its number, its tokens, and which of their
    choices it is. Tokens come in the order of choices, as in transformers' loop."""
    chosen = torch.nn.functional.one_hot(top_k_index.clamp(max=num_experts), num_experts + 1)
    num_tokens_E = chosen.sum((0, 1))[:num_experts].tolist()
    for index, num_tokens in enumerate(num_tokens_E):
        if num_tokens:
            choice_N, token_N = torch.where(chosen[..., index].T)
            yield index, token_N, choice_N


def takes_halves(experts: nn.Module) -> bool:
    """Whether the gate of an experts module takes gate and up one behind the other: its first
    output depends on the first value and on the first of the second half, and on no other."""
    x = torch.linspace(0.1, 0.8, 8, dtype=torch.float64, device="cpu")[None]
    try:
        slopes = torch.autograd.functional.jacobian(
            lambda values: type(experts)._apply_gate(experts, values)[0, 0],  # type: ignore
            x,
        )
    except Exception:  # a gate that needs more than its input
        return False
    return slopes[0].nonzero()[:, 0].tolist() == [0, 4]  # type: ignore[union-attr]


@dataclass(frozen=True)
class ExpertLinear:
    """A linear of an expert."""

    owner: LinearExperts
    expert: str
    """full name of the expert"""
    role: str
    """full name of the linear without the number of its expert: what the other experts have one of
    as well"""
    side: str
    """the role of all linears that read the same input"""
    reads_the_stream: bool
    """whether its input are the states that all experts get, rather than features of its own"""


def expert_linears(model: nn.Module, prefix: str, names: Iterable[str]) -> dict[str, ExpertLinear]:
    """Those of these linears that are in `LinearExperts`.

    Args:
        model: the module that has them.
        prefix: its full name.
        names: full names.
    """
    owners = {
        name: module
        for name, module in model.named_modules(prefix=prefix)
        if isinstance(module, LinearExperts)
    }
    found = {}
    for name in names:
        owner = next((own for own in owners if name.startswith(f"{own}.")), None)
        if owner is None:
            continue
        number, _, key = name.removeprefix(f"{owner}.").partition(".")
        first = key != "down_proj" and not owner.endswith("output_linear")
        found[name] = ExpertLinear(
            owners[owner],
            f"{owner}.{number}",
            f"{owner}.*.{key}" if key else f"{owner}.*",
            f"{owner} {'input' if first else 'output'}",
            first,
        )
    return found


def roles_of(name: str) -> list[str]:
    """What the role of a linear may be by its full name alone."""
    pieces = name.split(".")
    return [
        ".".join([*pieces[:i], "*", *pieces[i + 1 :]])
        for i, piece in enumerate(pieces)
        if piece.isdigit()
    ]
