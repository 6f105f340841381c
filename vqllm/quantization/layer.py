"""Quantize the linears of one loaded decoder layer, input group by input group.

    measure H of q, k, v ─► quantize them ─► measure H of o ─► quantize it ─► gate, up ─► down

The layer runs with the decoded weights of what is quantized, so that each group is rounded for the
inputs that it will really have.
"""

import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from vqllm.allocation.choose_codecs import Allocated
from vqllm.calibration.hessian import InputHessian
from vqllm.calibration.layer_calibrator import InputGroup, LayerCalibrator
from vqllm.checkpoint.packed_matrix import PackedMatrix
from vqllm.core.listing import listed
from vqllm.core.progress import Progress
from vqllm.plan.cuts import Cut
from vqllm.quantization.layer_training import LayerTrainer
from vqllm.quantization.linear import Statistics, quantize_group
from vqllm.quantization.loaded_layer import LoadedLayer, install
from vqllm.recipes import Recipe

logger = logging.getLogger(__name__)

HESSIAN_BYTES = 1 << 30
"""Of the Hessians of a layer that are in memory together; one always is."""


@dataclass(frozen=True)
class LayerTask:
    """A loaded layer that is to be quantized, and what was found out about it before."""

    layer: LoadedLayer
    outputs: Mapping[str, Tensor]
    """packed H_O, where the rounding rule needs them"""
    allocation: Mapping[str, Allocated]
    """of all linears of the model, where bits are allocated"""
    trainer: LayerTrainer | None
    """where the recipe trains layers"""
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    """where processes cut linears, of all of the model"""


def quantize_layer(
    task: LayerTask, calibrator: LayerCalibrator, recipe: Recipe, progress: Progress
) -> list[PackedMatrix]:
    """Quantize the linears of a loaded layer, and install the decoded weights in it.

    With `refresh: group` the Hessian of each input group is measured after the groups that run
    before it are quantized; with `refresh: layer` all are measured on the unquantized layer.
    """
    layer, trainer = task.layer, task.trainer
    groups = calibrator.groups(layer.index, layer.linears)
    in_order = stages(groups) if recipe.hessian.refresh == "group" else [groups]
    results: list[PackedMatrix] = []
    unfinished = dict(layer.linears)
    for stage in in_order:
        done: list[PackedMatrix] = []
        for chunk in calibrator.chunks(layer.linears, stage, HESSIAN_BYTES):
            done += _quantize_groups(task, chunk, calibrator, recipe)
        if recipe.hessian.refresh == "layer":
            _install(done, layer)
        names = [name for group in stage for name in group.names]
        # What is not rounded yet takes over what rounding broke, where the recipe trains layers.
        if trainer:
            done = trainer.train(names, done)
        for quantized in done:
            progress.linear(quantized.record.to_dict())
        results += done
        for name in names:
            del unfinished[name]
        # Nothing is settled before the last training; after it, or with nothing unfinished, only
        # the output of the layer is left to compute.
        if unfinished and not trainer:
            calibrator.settle(layer.module, unfinished.values())
    _warn_of_unreached(results)
    return trainer.finished(results) if trainer else results


def _warn_of_unreached(results: list[PackedMatrix]) -> None:
    """Once a layer: a short calibration may miss a hundred experts in each."""
    experts = {r.name.rpartition(".")[0] for r in results if r.record.num_tokens == 0}
    if experts:
        logger.warning(
            "no calibration token reached %d experts of a layer (%s): they are rounded for the "
            "inputs of the others; report.md names all",
            len(experts),
            listed(experts),
        )


def stages(groups: list[InputGroup]) -> list[list[InputGroup]]:
    """The groups one by one; those of all experts that read one input together, since none of them
    changes what another reads."""
    return [
        list(own)
        for _, own in itertools.groupby(groups, key=lambda group: group.side or group.names)
    ]


def _quantize_groups(
    task: LayerTask, groups: list[InputGroup], calibrator: LayerCalibrator, recipe: Recipe
) -> list[PackedMatrix]:
    """Measure H of some groups at once, and quantize them."""
    results: list[PackedMatrix] = []
    waiting = calibrator.hessians(task.layer.index, task.layer.linears, groups)[::-1]
    for group in groups:
        results += _quantize_group(task, group, waiting.pop(), recipe)
    return results


def _quantize_group(
    task: LayerTask, group: InputGroup, hessian: InputHessian, recipe: Recipe
) -> list[PackedMatrix]:
    """Quantize a group, and let go of all that is not needed any more: for an expert of 14336
    features, H alone is 0.8 GB."""
    layer, allocation = task.layer, task.allocation
    if not hessian.is_known:  # of all experts no token reached one
        return []
    W = {name: layer.weights[name].float() for name in group.names}
    H_CC, num_tokens = hessian.matrix(group.names[0]), hessian.num_tokens
    statistics = Statistics(H_CC, num_tokens, hessian.drift, task.outputs)
    del hessian
    codecs = {name: allocation[name].codec for name in W if name in allocation}
    trained = task.trainer.weights(group.names) if task.trainer else None
    made = quantize_group(W, statistics, recipe, codecs, trained, task.cuts)
    made = [_placed(own, task) for own in made]
    if recipe.hessian.refresh == "group":
        _install(made, layer)
    if not task.trainer:
        for name in group.names:
            del layer.weights[name]
    # Those of experts are decoded again where they are needed: all of a layer take much memory.
    return [replace(own, decoded_RC=None) for own in made] if group.side else made


def _install(results: list[PackedMatrix], layer: LoadedLayer) -> None:
    for quantized in results:
        install(layer.linears[quantized.name], "weight", quantized.W_hat_RC)


def _placed(quantized: PackedMatrix, task: LayerTask) -> PackedMatrix:
    """The record with the layer, and what the allocation of bits expected."""
    allocated = task.allocation.get(quantized.name)
    record = replace(
        quantized.record,
        layer=task.layer.index,
        expected_kl=None if allocated is None else allocated.expected_kl,
    )
    return replace(quantized, record=record)
