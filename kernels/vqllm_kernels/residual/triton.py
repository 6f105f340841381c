"""Kernels of residual-v1: those of its stages, one after the other.

Each stage but the last writes float32, which the next one adds to its own sums before it rounds, so
a sum of stages is rounded once, and costs one launch a stage and nothing else.
"""

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from vqllm_kernels import activations, gpu
from vqllm_kernels.activations import Quantized, Wanted
from vqllm_kernels.choice import Call
from vqllm_kernels.formats import FormatSpec
from vqllm_kernels.residual.reference import stage_tensors
from vqllm_kernels.residual.spec import ResidualSpec


def declines(call: Call) -> str | None:
    """Why a call cannot be served: the reason of the first stage that has one, or None."""
    assert isinstance(call.spec, ResidualSpec)
    for i, stage in enumerate(call.spec.stages):
        kernels = gpu.module(stage)
        if kernels is None:
            return f"stage {i}: {stage.format_id} has no kernel"
        reason = kernels.declines(replace(call, spec=stage))
        if reason is not None:
            return f"stage {i}: {reason}"
    return None


def _kernels(stage: FormatSpec) -> ModuleType:
    kernels = gpu.module(stage)
    assert kernels is not None
    return kernels


def wanted(spec: FormatSpec, x_NC: Tensor) -> Wanted | None:
    """What all stages take in place of x, if it is the same."""
    assert isinstance(spec, ResidualSpec)
    first, *others = [_kernels(stage).wanted(stage, x_NC) for stage in spec.stages]
    return first if all(other == first for other in others) else None


def matmuls(
    x_NC: Tensor | Quantized,
    tensors: Sequence[dict[str, Tensor]],
    spec: FormatSpec,
    rows: Sequence[int],
    cols: int,
    dtype: torch.dtype,
    adds: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """x Wᵀ (+ add), `dtype` [N, rows], of each of the members; arguments as those of the stages."""
    assert isinstance(spec, ResidualSpec)
    last = len(spec.stages) - 1
    if isinstance(x_NC, Tensor) and len(x_NC) and (shared := wanted(spec, x_NC)):
        x_NC = activations.quantized(x_NC, shared)
    for i, stage in enumerate(spec.stages):
        out = dtype if i == last else torch.float32
        own = [stage_tensors(every, i) for every in tensors]
        adds = _kernels(stage).matmuls(x_NC, own, stage, rows, cols, out, adds)
    assert adds is not None
    return list(adds)


def decode(
    tensors: dict[str, Tensor],
    spec: FormatSpec,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    add_RC: Tensor | None = None,
) -> Tensor:
    """W (+ add), `dtype` [rows, cols]."""
    assert isinstance(spec, ResidualSpec)
    last = len(spec.stages) - 1
    for i, stage in enumerate(spec.stages):
        out = dtype if i == last else torch.float32
        add_RC = _kernels(stage).decode(stage_tensors(tensors, i), stage, rows, cols, out, add_RC)
    assert add_RC is not None
    return add_RC
