"""The linears of a model, coded layer by layer, each for the inputs that it will really have.

    measure H of q, k, v ─► code them ─► measure H of o ─► code it ─► gate, up ─► down ─► next layer

The layer runs with the decoded weights of what is coded. One H is in memory at a time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vqllm.calibration.hessian import InputGroup, InputHessian
from vqllm.calibration.layer_calibrator import LayerCalibrator
from vqllm.calibration.layer_stream import LayerStream
from vqllm.core import linalg, metrics
from vqllm.core.progress import Progress
from vqllm.core.protocols import JSON
from vqllm.errors import NumericalError
from vqllm.export.native_rounding import NativeMatrix, round_matrix
from vqllm.export.native_types import NativeType
from vqllm.hf.decoder_layers import linears_of
from vqllm.quantization.checks import check_finite
from vqllm.quantization.loaded_layer import install

ACTIVATION_BYTES = 4 << 30


@dataclass(frozen=True)
class Coded:
    """A linear by its full name."""

    name: str
    matrix: NativeMatrix
    record: JSON


def coded_linears(
    stream: LayerStream,
    tokens_SL: Tensor,
    types: Mapping[str, NativeType],
    scratch: Path,
    progress: Progress,
) -> Iterator[Coded]:
    """Code linears in the order of the layers.

    Args:
        stream: the unquantized model.
        tokens_SL: calibration sequences, int64.
        types: of the linears that are coded, by full name.
        scratch: a folder for hidden states that do not fit in memory.

    Raises:
        NumericalError: weights or activations that are not finite; names the linear.
    """
    calibrator = LayerCalibrator(stream, tokens_SL, ACTIVATION_BYTES, scratch)
    progress.layers(len(stream), 0)
    try:
        for index, name in enumerate(stream.names):
            with stream.layer(index) as module:
                found = linears_of(module, name, stream.shared)
                linears = {own: linear for own, linear in found.items() if own in types}
                check_finite(module, name, linears.values())
                weights = {own: linear.weight.data for own, linear in linears.items()}
                stream.cast(index)
                calibrator.begin(linears)
                records = []
                for coded in _layer(calibrator, index, module, linears, weights, types):
                    progress.linear(coded.record)
                    records.append(coded.record)
                    yield coded
                if index + 1 < len(stream):
                    calibrator.advance(index)
            progress.layer(index, records)
    finally:
        calibrator.close()


def _layer(
    calibrator: LayerCalibrator,
    index: int,
    module: nn.Module,
    linears: Mapping[str, nn.Linear],
    weights: Mapping[str, Tensor],
    types: Mapping[str, NativeType],
) -> Iterator[Coded]:
    """Code the linears of a loaded layer, input group by input group."""
    unfinished = dict(linears)
    for group in calibrator.groups(index, linears) if linears else ():
        [hessian] = calibrator.hessians(index, linears, [group])
        H_CC = _matrix(hessian, group)
        for name in group.names:
            W_RC = weights[name].float()
            if not bool(torch.isfinite(W_RC).all()):
                raise NumericalError(f"{name} has weights that are NaN or infinite.")
            try:
                matrix = round_matrix(types[name], W_RC, H_CC)
            except NumericalError as error:
                raise NumericalError(f"{name}: {error}") from error
            install(linears[name], "weight", matrix.W_hat_RC)
            del unfinished[name]
            record = {"name": name, "proxy_loss": metrics.proxy_loss(W_RC, matrix.W_hat_RC, H_CC)}
            yield Coded(name, matrix, record)
        del hessian, H_CC
        if unfinished:
            calibrator.settle(module, unfinished.values())


def _matrix(hessian: InputHessian, group: InputGroup) -> Tensor:
    """H of a group; the identity where its input was zero on every token, or none came."""
    if hessian.is_known:
        H_CC = hessian.matrix(group.names[0])
        if not linalg.is_zero(H_CC):
            return H_CC
    return torch.eye(len(hessian.total_CC), device=hessian.total_CC.device)
