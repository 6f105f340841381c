"""What one process holds of the parts of a linear, and the steps of a product with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear

from vqllm.core.tensors import frozen
from vqllm.integrations.vllm import cuts
from vqllm.integrations.vllm.packed import PackedLinears
from vqllm.integrations.vllm.stored import WEIGHT
from vqllm_kernels import dispatch, slices
from vqllm_kernels.linear import LinearSpec


@dataclass(frozen=True)
class Plan:
    """What a process holds of each part, decided before weights are read."""

    is_packed: bool
    ranges: list[list[slices.Range]]
    """Its rows of each part."""
    shares: list[bool]
    """Whether it holds a share of the rows of W' in place of rows or columns of W."""

    @classmethod
    def of(
        cls,
        layer: LinearBase,
        names: Sequence[str],
        specs: Sequence[LinearSpec | None],
        ranges: list[list[slices.Range]],
        is_packed: bool,
    ) -> "Plan":
        size = getattr(layer, "tp_size", 1)
        if not is_packed or size == 1:
            return cls(is_packed, ranges, [False] * len(specs))
        shares = []
        for name, spec, own in zip(names, specs, ranges):
            if spec is None:
                shares.append(False)
                continue
            if isinstance(layer, RowParallelLinear):
                is_cut = slices.ends_of_columns(spec, columns_of(layer))
            else:
                is_cut = len(own) == 1 and slices.ends_of_rows(spec, own[0])
            if not is_cut:
                cuts.check_divides(name, spec, size)
            shares.append(not is_cut)
        return cls(is_packed, ranges, shares)


@dataclass(frozen=True)
class Held:
    """The packed parts that a process holds, and what is left to do after the product."""

    linears: PackedLinears
    shares: list[bool]
    outputs: dict[int, tuple[list[Any], list[slices.Range]]]
    """of parts held by share: the transforms of the output, and the rows that are kept then"""
    gathers_input: bool
    adds_up: bool
    """Whether y is summed over processes by someone else."""

    @classmethod
    def of(
        cls,
        layer: LinearBase,
        plan: Plan,
        specs: Sequence[LinearSpec | None],
        parts: Sequence[dict[str, Tensor]],
    ) -> "Held":
        size, rank = getattr(layer, "tp_size", 1), getattr(layer, "tp_rank", 0)
        is_row = isinstance(layer, RowParallelLinear) and size > 1
        held, outputs = [], {}
        for i, (spec, own) in enumerate(zip(specs, parts)):
            if spec is None:
                W_RC = cuts.dense_rows(own[WEIGHT], plan.ranges[i]).to(layer.vqllm_dtype)
                start, stop = columns_of(layer) if is_row else (0, W_RC.shape[1])
                held.append((None, {WEIGHT: W_RC[:, start:stop].contiguous()}))
            elif plan.shares[i]:
                held.append(cuts.share_of(spec, own, rank, size))
                outputs[i] = _outputs(layer, i, spec, own), plan.ranges[i]
            else:
                cut = (
                    slices.columns_of(spec, own, columns_of(layer))
                    if is_row
                    else slices.rows_of(spec, own, whole(plan.ranges[i]))
                )
                held.append(cut)
        shared = is_row and any(plan.shares)
        adds_up = shared and not layer.reduce_results
        if shared:  # every process has the whole sum
            layer.reduce_results = False
        linears = PackedLinears.of(layer, held, layer.vqllm_dtype)
        return cls(linears, plan.shares, outputs, shared, adds_up)

    def multiply(self, layer: LinearBase, x: Tensor, bias: Tensor | None) -> Tensor:
        """y of the parts, one behind the other."""
        if self.gathers_input:
            x = tensor_model_parallel_all_gather(x.contiguous(), -1)
        ys = self.linears(layer, x)
        if self.outputs:
            ys = self._after_shares(layer, ys)
        y = ys[0] if len(ys) == 1 else torch.cat(ys, -1)
        if self.gathers_input:
            if self.adds_up and layer.tp_rank > 0:
                return torch.zeros_like(y)
            if not layer.skip_bias_add:  # vLLM gives it to the first process alone
                bias = layer.bias
        return y if bias is None else y + bias

    def _after_shares(self, layer: nn.Module, ys: list[Tensor]) -> list[Tensor]:
        """Where shares are held: y' of all processes, its transforms, the rows that are kept."""
        shared = list(self.outputs)
        sizes = [ys[i].shape[-1] for i in shared]
        one = torch.cat([ys[i] for i in shared], -1)
        every = tensor_model_parallel_all_gather(one, -1)
        each = every.unflatten(-1, (-1, sum(sizes))).split(sizes, -1)
        for i, y in zip(shared, each):
            stages, ranges = self.outputs[i]
            y = y.flatten(-2)
            for transform, names in stages:
                state = {name: getattr(layer, own) for name, own in names.items()}
                y = dispatch.transform(y, transform, state, "output")
            kept = [y[..., start:stop] for start, stop in ranges]
            ys[i] = kept[0] if len(kept) == 1 else torch.cat(kept, -1)
        return ys


def _outputs(layer: nn.Module, part: int, spec: LinearSpec, own: dict[str, Tensor]) -> list[Any]:
    """The transforms of an output in the order in which they are applied, with the names under
    which their tensors are registered."""
    stages = []
    for i, transform in reversed(list(enumerate(spec.transforms))):
        if transform.side == "out":
            names = {name: f"vqllm_{part}_out{i}_{name}" for name in transform.layout()}
            for name, registered in names.items():
                layer.register_parameter(registered, frozen(own[f"t{i}_{name}"]))
            stages.append((transform, names))
    return stages


def whole(ranges: Sequence[slices.Range]) -> slices.Range:
    """One range of ranges that follow each other."""
    return ranges[0][0], ranges[-1][1]


def columns_of(layer: RowParallelLinear) -> slices.Range:
    """The columns of this process."""
    cols = layer.input_size_per_partition
    return layer.tp_rank * cols, (layer.tp_rank + 1) * cols
