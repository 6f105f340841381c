"""The linears of a model, coded layer by layer, each for the inputs that it will really have.

    measure H of q, k, v ─► code them ─► measure H of o ─► code it ─► gate, up ─► down ─► next layer

The layer runs with the decoded weights of what is coded.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqllm.calibration.hessian import InputGroup, InputHessian
from vqllm.calibration.layer_calibrator import LayerCalibrator
from vqllm.calibration.layer_stream import LayerStream
from vqllm.core import linalg, metrics
from vqllm.core.listing import listed
from vqllm.core.progress import Progress
from vqllm.errors import NumericalError
from vqllm.export.coded_layers import Coded, CodedLayers, decoded
from vqllm.export.native_rounding import round_matrix
from vqllm.export.native_types import NativeType
from vqllm.hf.decoder_layers import linears_of
from vqllm.quantization.checks import check_finite
from vqllm.quantization.layer import in_stages, measured_groups
from vqllm.quantization.loaded_layer import install

logger = logging.getLogger(__name__)

ACTIVATION_BYTES = 4 << 30


def code_layers(
    stream: LayerStream,
    tokens_SL: Tensor,
    types: Mapping[str, NativeType],
    expert_shrinkage: float,
    run: CodedLayers,
    progress: Progress,
) -> None:
    """Code the layers of a model that are not finished in the folder of a run.

    Args:
        stream: the unquantized model.
        tokens_SL: calibration sequences, int64.
        types: of the linears that are coded, by full name.
        expert_shrinkage: of the Hessians of experts.

    Raises:
        NumericalError: weights or activations that are not finite; names the linear.
    """
    calibrator = LayerCalibrator(
        stream, tokens_SL, ACTIVATION_BYTES, run.scratch, shrinkage=expert_shrinkage
    )
    num = len(stream)
    progress.layers(num, run.num_finished)
    try:
        # All of them, since the inputs of a layer are outputs of those before it.
        for index in range(num if run.num_finished < num else 0):
            name = stream.names[index]
            with stream.layer(index) as module:
                found = linears_of(module, name, stream.shared)
                linears = {own: linear for own, linear in found.items() if own in types}
                check_finite(module, name, linears.values())
                weights = {own: linear.weight.data for own, linear in linears.items()}
                stream.cast(index)
                calibrator.begin(linears)
                if index < run.num_finished:
                    for own, W_hat_RC in run.decoded(index):
                        install(linears[own], "weight", W_hat_RC)
                else:
                    task = _Layer(calibrator, index, module, linears, weights, types)
                    run.write_layer(index, _told(task.coded(), progress))
                if index + 1 < num:
                    calibrator.advance(index)
            progress.layer(index, run.records(index))
    finally:
        calibrator.close()


def _told(coded: Iterator[Coded], progress: Progress) -> Iterator[Coded]:
    for own in coded:
        progress.linear(own.record)
        yield own


@dataclass
class _Layer:
    """A loaded layer that is coded."""

    calibrator: LayerCalibrator
    index: int
    module: nn.Module
    linears: Mapping[str, nn.Linear]
    weights: dict[str, Tensor]
    """theirs, as stored, until they are coded"""
    types: Mapping[str, NativeType]

    def coded(self) -> Iterator[Coded]:
        """Code the linears input group by input group; those of all experts that read one input
        together."""
        unreached = []
        groups = self.calibrator.groups(self.index, self.linears) if self.linears else []
        of_layer = self.calibrator, self.index, self.module, self.linears
        for group, hessian in measured_groups(*of_layer, in_stages(groups)):
            unreached += group.names if hessian.num_tokens == 0 else ()
            yield from self._group(group, hessian)
            del hessian
        if unreached:
            logger.warning(
                "no calibration token reached %d linears of a layer (%s): they are rounded for the "
                "inputs of the others",
                *(len(unreached), listed(unreached)),
            )

    def _group(self, group: InputGroup, hessian: InputHessian) -> Iterator[Coded]:
        H_CC = _matrix(hessian, group)
        for name in group.names:
            W_RC = self.weights.pop(name).float()
            if not bool(torch.isfinite(W_RC).all()):
                raise NumericalError(f"{name} has weights that are NaN or infinite.")
            native = self.types[name]
            try:
                matrix = round_matrix(native, W_RC, H_CC)
            except NumericalError as error:
                raise NumericalError(f"{name}: {error}") from error
            record = {"name": name, "proxy_loss": metrics.proxy_loss(W_RC, matrix.W_hat_RC, H_CC)}
            blocks_RB = matrix.blocks_RB.cpu()
            # As the blocks are decoded when the run goes on.
            install(self.linears[name], "weight", decoded(blocks_RB, native.name))
            yield Coded(name, native.name, blocks_RB, record)


def _matrix(hessian: InputHessian, group: InputGroup) -> Tensor:
    """H of a group; the identity where its input was zero on every token, or none came."""
    if hessian.is_known:
        H_CC = hessian.matrix(group.names[0])
        if not linalg.is_zero(H_CC):
            return H_CC
    return torch.eye(len(hessian.total_CC), device=hessian.total_CC.device)
