"""What an embedding and an output head cost in each type: nats a token that its errors alone add to
the KL divergence of the predictions.

One type of each is measured: the model runs on a few sequences with the matrix rounded and without.
The other types cost in proportion to their squared errors.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqllm.calibration.gradients import LOGIT_BYTES
from vqllm.calibration.layer_calls import States
from vqllm.calibration.layer_stream import LayerStream
from vqllm.calibration.passes import batches
from vqllm.core import threads
from vqllm.export.native_rounding import round_to_nearest
from vqllm.export.native_types import NativeType

ROWS = 4096
"""Of a matrix, that are rounded to learn its errors; and those that are rounded at a time."""
SEQUENCES = 16
"""Calibration sequences that the model runs on."""
MEASURED_BITS = 4.5
"""The type nearest to this is measured: its errors are large enough to see, and small enough that
the divergence grows with their squares."""


@dataclass(frozen=True)
class Outside:
    """An embedding, a head, or both in one tensor."""

    modules: tuple[nn.Module, ...]
    """that use the matrix, in the model of a stream"""
    types: tuple[NativeType, ...]
    """that it is offered"""


def ends(model: Any, reader: Any) -> list[str]:
    """The tensors of a GGUF file that are the model's embedding and its output head.

    Args:
        model: transformers' model; its weights may be on the meta device.
        reader: a `gguf.GGUFReader`.
    """
    shapes = {name: tuple(_weight(module).shape) for name, module in _modules(model).items()}
    return [
        tensor.name
        for tensor in reader.tensors
        if shapes.get(tensor.name) == tuple(int(size) for size in reversed(tensor.shape))
    ]


def _modules(model: Any) -> dict[str, nn.Module]:
    found = {
        "token_embd.weight": model.get_input_embeddings(),
        "output.weight": model.get_output_embeddings(),
    }
    return {
        name: module
        for name, module in found.items()
        if isinstance(getattr(module, "weight", None), Tensor)
    }


def losses(
    stream: LayerStream, tokens_SL: Tensor, offered: Mapping[str, Sequence[NativeType]], tied: bool
) -> dict[str, list[float]]:
    """Losses of matrices outside the layers, by the names of their tensors.

    Args:
        stream: the unquantized model.
        tokens_SL: calibration sequences, int64.
        offered: the types of each.
        tied: whether the head has no tensor of its own.
    """
    modules = _modules(stream.model)
    matrices = {}
    for name, types in offered.items():
        matrices[name] = Outside((*modules.values(),) if tied else (modules[name],), tuple(types))
    tokens_SL = tokens_SL[:SEQUENCES]
    errors = {name: _squared_errors(matrix) for name, matrix in matrices.items()}
    rounded = {name: _rounded(own.modules[0], _measured(own)) for name, own in matrices.items()}
    found = _divergences(stream, tokens_SL, [(matrices[name], rounded[name]) for name in matrices])
    found_losses = {}
    for (name, matrix), kl in zip(matrices.items(), found):
        own = errors[name]
        at = own[matrix.types.index(_measured(matrix))]
        found_losses[name] = [kl * error / at if at > 0 else 0.0 for error in own]
    return found_losses


def _measured(matrix: Outside) -> NativeType:
    return min(matrix.types, key=lambda native: abs(native.bits - MEASURED_BITS))


def _squared_errors(matrix: Outside) -> list[float]:
    """Of some rows in each type."""
    weight_VC = _weight(matrix.modules[0])
    W_RC = weight_VC[:: -(-len(weight_VC) // ROWS)].float()
    return [
        float(threads.total((W_RC - round_to_nearest(native, W_RC).W_hat_RC).double().square()))
        for native in matrix.types
    ]


def _rounded(module: nn.Module, native: NativeType) -> Tensor:
    """The weight of a module as a type reproduces it."""
    weight_VC = _weight(module)
    parts = [round_to_nearest(native, W_RC.float()) for W_RC in weight_VC.split(ROWS)]
    return torch.cat([part.W_hat_RC.to(weight_VC.dtype) for part in parts])


def _weight(module: nn.Module) -> Tensor:
    return module.get_parameter("weight").data


def _divergences(
    stream: LayerStream, tokens_SL: Tensor, variants: Sequence[tuple[Outside, Tensor]]
) -> list[float]:
    """Mean KL divergence of the predictions with each of the variants from those without, nats a
    token. A variant is a weight for the modules of a matrix."""
    matrices: list[tuple[Outside, Tensor] | None] = [None, *variants]
    rows = [*batches(tokens_SL, stream.device)]
    states: dict[tuple[int, int], States | None] = {}
    for index in range(len(stream)):
        with stream.ready(index):
            for v, variant in enumerate(matrices):
                with _replaced(variant):
                    for b, own in enumerate(rows):
                        before = states.get((v, b))
                        states[v, b] = stream.run(index, tokens_SL[own], before)
    totals = [0.0] * len(variants)
    vocabulary = len(_weight(stream.model.get_output_embeddings()))
    most = max(1, LOGIT_BYTES // (4 * vocabulary * tokens_SL.shape[1]))
    for b, own in enumerate(rows):
        for part in batches(tokens_SL[own], stream.device, most):
            tokens = tokens_SL[own][part]
            log_p = _log_p(stream, tokens, states[0, b], part, None)
            for v, variant in enumerate(variants):
                log_q = _log_p(stream, tokens, states[v + 1, b], part, variant)
                kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
                totals[v] += float(kl.double())
    return [total / tokens_SL.numel() for total in totals]


def _log_p(
    stream: LayerStream,
    tokens: Tensor,
    states: States | None,
    part: slice,
    variant: tuple[Outside, Tensor] | None,
) -> Tensor:
    """Logarithms of the predictions, float32 [S, L, V], from the states behind the last layer."""
    assert states is not None, "no hook ends this pass early"
    with _replaced(variant):
        return stream.after(tokens, states.hidden[part]).float().log_softmax(-1)


@contextlib.contextmanager
def _replaced(variant: tuple[Outside, Tensor] | None) -> Iterator[None]:
    """Within, the modules of a matrix have another weight."""
    if variant is None:
        yield
        return
    matrix, weight = variant
    parameters = [module.get_parameter("weight") for module in matrix.modules]
    before = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = weight
    try:
        yield
    finally:
        for parameter, old in zip(parameters, before):
            parameter.data = old
