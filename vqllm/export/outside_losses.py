"""What an embedding and an output head cost in each type: nats a token that its errors alone add to
the KL divergence of the predictions.

One type of each is measured: the model runs on a few sequences with the matrix rounded and without.
The other types cost in proportion to their errors.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqllm.calibration.gradients import LOGIT_BYTES
from vqllm.calibration.layer_calls import States
from vqllm.calibration.layer_stream import LayerStream
from vqllm.calibration.passes import batches
from vqllm.core import threads
from vqllm.export.ends import ROWS, modules_of, round_rows
from vqllm.export.native_types import NativeType

SAMPLE = 4096
"""Rows of a matrix that are rounded to learn its errors in a type."""
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
    H_CC: Tensor | None
    """what it is rounded with; None: to nearest"""

    @property
    def weight(self) -> Tensor:
        return self.modules[0].get_parameter("weight").data


def losses(
    stream: LayerStream,
    tokens_SL: Tensor,
    offered: Mapping[str, Sequence[NativeType]],
    hessians: Mapping[str, Tensor],
    tied: bool,
) -> dict[str, list[float]]:
    """Losses of matrices outside the layers, by the names of their tensors.

    Args:
        stream: the unquantized model.
        tokens_SL: calibration sequences, int64.
        offered: the types of each.
        hessians: those of the matrices that are not rounded to nearest.
        tied: whether the head has no tensor of its own.
    """
    modules = modules_of(stream.model)
    matrices = {}
    for name, types in offered.items():
        users = (*modules.values(),) if tied else (modules[name],)
        matrices[name] = Outside(users, tuple(types), hessians.get(name))
    variants = [(matrix, _rounded(matrix, _measured(matrix))) for matrix in matrices.values()]
    found = {}
    for (name, matrix), kl in zip(
        matrices.items(), _divergences(stream, tokens_SL[:SEQUENCES], variants)
    ):
        errors = _errors(matrix)
        measured = errors[matrix.types.index(_measured(matrix))]
        found[name] = [kl * own / measured if measured > 0 else 0.0 for own in errors]
    return found


def _measured(matrix: Outside) -> NativeType:
    return min(matrix.types, key=lambda native: abs(native.bits - MEASURED_BITS))


def _errors(matrix: Outside) -> list[float]:
    """tr(E H Eᵀ) of some rows in each type."""
    W_RC = matrix.weight[:: -(-len(matrix.weight) // SAMPLE)].float()
    errors = []
    for native in matrix.types:
        E_RC = W_RC - round_rows(native, W_RC, matrix.H_CC, passes=0).W_hat_RC
        EH_RC = E_RC if matrix.H_CC is None else E_RC @ matrix.H_CC
        errors.append(float(threads.total((EH_RC * E_RC).double())))
    return errors


def _rounded(matrix: Outside, native: NativeType) -> Tensor:
    """The weight as a type reproduces it."""
    weight_VC = matrix.weight
    parts = (round_rows(native, W_RC, matrix.H_CC, passes=0) for W_RC in weight_VC.split(ROWS))
    return torch.cat([part.W_hat_RC.to(weight_VC.dtype) for part in parts])


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
    vocabulary = stream.model.config.get_text_config().vocab_size
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
