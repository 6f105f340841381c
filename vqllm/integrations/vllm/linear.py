"""Linears of vLLM, alone or fused, of which at least one part is quantized."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from vqllm.core.tensors import frozen
from vqllm.integrations.vllm import cuts, refusals
from vqllm.integrations.vllm.held import Held, Plan, columns_of
from vqllm.integrations.vllm.mode import Mode, is_packed
from vqllm.integrations.vllm.stored import WEIGHT, default_float32, take, wait_for
from vqllm_kernels import slices
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
        wait_for(layer, self.specs, params_dtype, self.config.check_places)
        pieces = pieces_of(layer, output_size)
        ranges = self._ranges(layer, pieces, input_size)
        known = [spec for spec in self.specs if spec is not None]
        packed = is_packed(self.mode, known, layer.vqllm_device, params_dtype)
        layer.vqllm_plan = Plan.of(layer, self.names, self.specs, ranges, packed)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Take what was loaded. CheckpointError if some is missing or cannot be decoded."""
        parts = take(layer, self.names)
        if parts is None:
            return
        with default_float32():
            if layer.vqllm_plan.is_packed:
                layer.vqllm_held = Held.of(layer, layer.vqllm_plan, self.specs, parts)
                return
            layer.weight = frozen(self._decoded(layer, parts))
        self.dense.process_weights_after_loading(layer)

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [..., rows of this process] of x [..., columns of this process]."""
        if not layer.vqllm_plan.is_packed:
            return self.dense.apply(layer, x, bias)
        return layer.vqllm_held.multiply(layer, x, bias)

    def _ranges(
        self, layer: LinearBase, pieces: list[cuts.Piece], cols: int
    ) -> list[list[slices.Range]]:
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
