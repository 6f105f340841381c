"""Linears of vLLM, alone or fused, of which at least one part is quantized."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from vqllm.core.tensors import frozen
from vqllm.integrations.vllm import cuts, refusals
from vqllm.integrations.vllm.mode import Mode, is_packed
from vqllm.integrations.vllm.packed import PackedLinears
from vqllm.integrations.vllm.stored import WEIGHT, Stored, loader_into, place_holders
from vqllm_kernels import dispatch
from vqllm_kernels.linear import LinearSpec

if TYPE_CHECKING:
    from vqllm.integrations.vllm.config import VqllmConfig


class VqllmLinearMethod(LinearMethodBase):
    """Loads the parts, and multiplies with them packed or decoded."""

    def __init__(
        self,
        config: "VqllmConfig",
        names: Sequence[str],
        specs: Sequence[LinearSpec | None],
        mode: Mode,
    ) -> None:
        """
        Args:
            names: of the parts, in the order of their rows.
            specs: of the parts; None for a dense one.
        """
        self.config, self.names, self.specs = config, list(names), list(specs)
        self.mode: Mode = mode
        self.dense = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Make empty parameters for what the loader brings.

        Raises:
            ModelError: another size than that of the packed matrix, or tensor parallelism for which
                it cannot be divided.
        """
        layer.vqllm_dtype = params_dtype
        pieces = pieces_of(layer, output_size)
        ranges = self._ranges(layer, pieces, input_size)
        known = [spec for spec in self.specs if spec is not None]
        packed = is_packed(self.mode, known, torch.empty(0).device, params_dtype)
        layer.vqllm_plan = Plan.of(layer, self.names, self.specs, ranges, packed)
        stored = Stored(dict(enumerate(self.specs)))
        layer.vqllm_stored = stored
        layer.vqllm_parameters = place_holders(
            layer, stored.names(params_dtype), loader_into(stored, self.config.check_places)
        )

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Take what was loaded. CheckpointError if some is missing or cannot be decoded."""
        if not hasattr(layer, "vqllm_stored"):
            return
        parts = layer.vqllm_stored.complete(dict(enumerate(self.names)))
        for name in layer.vqllm_parameters:
            delattr(layer, name)
        device = torch.get_default_device()
        parts = [{name: t.to(device) for name, t in own.items()} for own in parts]
        del layer.vqllm_stored, layer.vqllm_parameters
        if layer.vqllm_plan.is_packed:
            layer.vqllm_held = Held.of(layer, layer.vqllm_plan, self.specs, parts)
        else:
            layer.weight = frozen(self._decoded(layer, parts))
            self.dense.process_weights_after_loading(layer)

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [..., rows of this process] of x [..., columns of this process]."""
        if not layer.vqllm_plan.is_packed:
            return self.dense.apply(layer, x, bias)
        return layer.vqllm_held.multiply(layer, x, bias)

    def _ranges(
        self, layer: LinearBase, pieces: list[cuts.Piece], cols: int
    ) -> list[list[cuts.Range]]:
        rows = [spec.rows if spec is not None else 0 for spec in self.specs]
        if len(rows) == len(pieces):
            for name, spec, piece in zip(self.names, self.specs, pieces):
                if spec is not None and (spec.rows, spec.cols) != (piece.rows, cols):
                    raise refusals.wrong_size(name, spec, piece.rows, cols)
            rows = [piece.rows for piece in pieces]
        rank, size = shares(layer)
        ranges = cuts.own_rows(rows, pieces, rank, size)
        if ranges is None:
            prefix = getattr(layer, "prefix", self.names[0])
            raise refusals.wrong_parts(prefix, self.names, [piece.rows for piece in pieces])
        return ranges

    def _decoded(self, layer: LinearBase, parts: Sequence[dict[str, Tensor]]) -> Tensor:
        """The dense weights of this process."""
        dense = []
        for spec, own, ranges in zip(self.specs, parts, layer.vqllm_plan.ranges):
            if spec is None:
                W_RC = own[WEIGHT].to(layer.vqllm_dtype)
            else:
                W_RC = spec.dequantize(own, layer.vqllm_dtype)
            dense.append(cuts.dense_rows(W_RC, ranges))
        W_RC = dense[0] if len(dense) == 1 else torch.cat(dense)
        if isinstance(layer, RowParallelLinear) and layer.tp_size > 1:
            start, stop = columns_of(layer)
            W_RC = W_RC[:, start:stop]
        return W_RC.contiguous()


@dataclass(frozen=True)
class Plan:
    """What a process holds of each part, decided before weights are read."""

    is_packed: bool
    ranges: list[list[cuts.Range]]
    """Its rows of each part."""
    shares: list[bool]
    """Whether it holds a share of the rows of W' in place of rows or columns of W."""

    @classmethod
    def of(
        cls,
        layer: LinearBase,
        names: Sequence[str],
        specs: Sequence[LinearSpec | None],
        ranges: list[list[cuts.Range]],
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
                is_cut = cuts.ends_of_columns(spec, columns_of(layer))
            else:
                is_cut = len(own) == 1 and cuts.ends_of_rows(spec, own[0])
            if not is_cut:
                cuts.check_divides(name, spec, size)
            shares.append(not is_cut)
        return cls(is_packed, ranges, shares)


@dataclass(frozen=True)
class Held:
    """The packed parts that a process holds, and what is left to do after the product."""

    linears: PackedLinears
    shares: list[bool]
    outputs: dict[int, tuple[list[Any], list[cuts.Range]]]
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
                    cuts.columns_of(spec, own, columns_of(layer))
                    if is_row
                    else cuts.rows_of(spec, own, whole(plan.ranges[i]))
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


def whole(ranges: Sequence[cuts.Range]) -> cuts.Range:
    """One range of ranges that follow each other."""
    return ranges[0][0], ranges[-1][1]


def pieces_of(layer: LinearBase, output_size: int) -> list[cuts.Piece]:
    """How vLLM shares out the rows of a linear."""
    if isinstance(layer, QKVParallelLinear):
        replicas = layer.num_kv_head_replicas
        return [
            cuts.Piece(layer.total_num_heads * layer.head_size),
            cuts.Piece(layer.total_num_kv_heads * layer.head_size, replicas),
            cuts.Piece(layer.total_num_kv_heads * layer.v_head_size, replicas),
        ]
    return [cuts.Piece(size) for size in getattr(layer, "output_sizes", [output_size])]


def shares(layer: LinearBase) -> tuple[int, int]:
    """The number of this process, and that of all that share the rows of a linear."""
    if isinstance(layer, RowParallelLinear):
        return 0, 1
    return getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1)


def columns_of(layer: RowParallelLinear) -> cuts.Range:
    """The columns of this process."""
    cols = layer.input_size_per_partition
    return layer.tp_rank * cols, (layer.tp_rank + 1) * cols
