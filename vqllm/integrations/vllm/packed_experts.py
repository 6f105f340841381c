"""Experts that stay packed, and their products: one expert after the other, with its tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vqllm.integrations.vllm.packed import PackedLinears
from vqllm.integrations.vllm.refusals import undivided_expert
from vqllm.integrations.vllm.stored import WEIGHT
from vqllm_kernels import slices
from vqllm_kernels.linear import LinearSpec

Tensors = dict[str, Tensor]
INPUTS, OUTPUT = ("w1", "w3"), "w2"
"""gate and up, and down, in vLLM's words."""


@dataclass(frozen=True)
class Expert:
    """The packed linears of one expert: of its input, and of its output."""

    first: PackedLinears
    second: PackedLinears


@dataclass(frozen=True)
class PackedExperts:
    """Those of a group that this process has, by number."""

    experts: Mapping[int, Expert]

    @classmethod
    def of(
        cls,
        layer: nn.Module,
        specs: Mapping[tuple[int, str], LinearSpec | None],
        tensors: Mapping[tuple[int, str], Tensors],
        dtype: torch.dtype,
        process: tuple[int, int],
    ) -> "PackedExperts":
        """Register what this process has of each expert as parameters of `layer`.

        Args:
            specs: by number and shard; None for a dense linear.
            dtype: of the activations.
            process: its number, and that of all that share the features of an expert.
        """

        def held(expert: int, shards: tuple[str, ...]) -> PackedLinears:
            parts = [
                _part(specs[expert, shard], tensors[expert, shard], shard, dtype, process)
                for shard in shards
                if (expert, shard) in specs
            ]
            return PackedLinears.of(layer, parts, dtype, f"vqllm_{expert}_{shards[0]}_")

        numbers = dict.fromkeys(expert for expert, _ in specs)
        return cls({n: Expert(held(n, INPUTS), held(n, (OUTPUT,))) for n in numbers})

    def __call__(
        self,
        layer: nn.Module,
        x: Tensor,
        weights: Tensor,
        chosen: Tensor,
        activate: Callable[[Tensor], Tensor],
        weigh_input: bool = False,
    ) -> Tensor:
        """The sum of the outputs of each token's experts, times their weights.

        Args:
            x: [tokens, features].
            weights: [tokens, experts of a token], float.
            chosen: numbers of these experts, integers of that shape. Those of other processes are
                left out.
            activate: gate and up, one behind the other, to the input of down.
            weigh_input: multiply the input of an expert by its weight in place of the output.
        """
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for number in chosen.unique().tolist():
            expert = self.experts.get(number)
            if expert is None:
                continue
            token, place = (chosen == number).nonzero(as_tuple=True)
            weight = weights[token, place, None].float()
            own = x[token]
            if weigh_input:
                own = (own * weight).to(x.dtype)
            inner = activate(torch.cat(expert.first(layer, own), -1))
            [out] = expert.second(layer, inner)
            y.index_add_(0, token, out.float() if weigh_input else out.float() * weight)
        return y.to(x.dtype)


def divides(specs: Mapping[tuple[int, str], LinearSpec | None], process: tuple[int, int]) -> bool:
    """Whether the part of a process is a linear of its own in every expert."""
    return all(spec is None or _ends(spec, part[1], process) for part, spec in specs.items())


def check_divides(
    specs: Mapping[tuple[int, str], LinearSpec | None],
    names: Mapping[tuple[int, str], str],
    process: tuple[int, int],
) -> None:
    """Raise ModelError where the part of a process is no linear of its own."""
    for part, spec in specs.items():
        if spec is not None and not _ends(spec, part[1], process):
            raise undivided_expert(names[part], process[1])


def _range(size: int, process: tuple[int, int]) -> slices.Range:
    rank, num = process
    return rank * size // num, (rank + 1) * size // num


def _ends(spec: LinearSpec, shard: str, process: tuple[int, int]) -> bool:
    size = spec.cols if shard == OUTPUT else spec.rows
    ends = slices.ends_of_columns if shard == OUTPUT else slices.ends_of_rows
    return size % process[1] == 0 and ends(spec, _range(size, process))


def _part(
    spec: LinearSpec | None, own: Tensors, shard: str, dtype: torch.dtype, process: tuple[int, int]
) -> tuple[LinearSpec | None, Tensors]:
    if spec is not None:
        if shard == OUTPUT:
            return slices.columns_of(spec, own, _range(spec.cols, process))
        return slices.rows_of(spec, own, _range(spec.rows, process))
    W_RC: Any = own[WEIGHT].to(dtype)
    start, stop = _range(W_RC.shape[shard == OUTPUT], process)
    return None, {WEIGHT: W_RC[:, start:stop] if shard == OUTPUT else W_RC[start:stop]}
