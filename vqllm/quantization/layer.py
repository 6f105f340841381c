"""Quantize the linears of one loaded decoder layer, input group by input group.

    measure H of q, k, v ─► quantize them ─► measure H of o ─► quantize it ─► gate, up ─► down

The layer runs with the decoded weights of what is quantized, so that each group is rounded for the
inputs that it will really have.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from vqllm.allocation.choose_codecs import Allocated
from vqllm.calibration.hessian import InputHessian
from vqllm.calibration.layer_calibrator import InputGroup, LayerCalibrator
from vqllm.checkpoint.packed_matrix import PackedMatrix
from vqllm.core.distributed import Processes
from vqllm.core.listing import listed
from vqllm.core.progress import Progress
from vqllm.plan.cuts import Cut
from vqllm.quantization.layer_training import LayerTrainer
from vqllm.quantization.linear import Statistics, quantize_group
from vqllm.quantization.loaded_layer import LoadedLayer, install
from vqllm.quantization.spreading import Spread
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
    """where processes of a server cut linears, of all of the model"""
    processes: Processes = field(default_factory=Processes)
    """those that quantize the layer together"""


def quantize_layer(
    task: LayerTask, calibrator: LayerCalibrator, recipe: Recipe, progress: Progress
) -> list[PackedMatrix]:
    """Quantize the linears of a loaded layer, and install the decoded weights in it.

    With `refresh: group` the Hessian of each input group is measured after the groups that run
    before it are quantized; with `refresh: layer` all are measured on the unquantized layer.
    """
    layer, trainer = task.layer, task.trainer
    groups = calibrator.groups(layer.index, layer.linears)
    in_order = in_stages(groups) if recipe.hessian.refresh == "group" else [groups]
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


def in_stages(groups: list[InputGroup]) -> list[list[InputGroup]]:
    """The groups one by one; those of all experts that read one input together, since none of them
    changes what another reads."""
    return [
        list(own)
        for _, own in itertools.groupby(groups, key=lambda group: group.side or group.names)
    ]


def measured_groups(
    calibrator: LayerCalibrator,
    index: int,
    module: nn.Module,
    linears: Mapping[str, nn.Linear],
    stages: list[list[InputGroup]],
) -> Iterator[tuple[InputGroup, InputHessian]]:
    """The input groups of a loaded layer with their H. Each comes with the weights that whoever
    takes them has installed in the groups of the stages before it.

    Args:
        index: of the layer, `module`.
        linears: those whose H are wanted, by full name.
        stages: their groups, as `in_stages` has them.
    """
    unfinished = dict(linears)
    for stage in stages:
        for chunk in calibrator.chunks(linears, stage, HESSIAN_BYTES):
            waiting = calibrator.hessians(index, linears, chunk)[::-1]
            for group in chunk:
                yield group, waiting.pop()
        for name in (name for group in stage for name in group.names):
            del unfinished[name]
        if unfinished:
            calibrator.settle(module, unfinished.values())


def _quantize_groups(
    task: LayerTask, groups: list[InputGroup], calibrator: LayerCalibrator, recipe: Recipe
) -> list[PackedMatrix]:
    """Measure H of some groups at once, and quantize them, each process some of their linears."""
    layer, names = task.layer, [name for group in groups for name in group.names]
    waiting = calibrator.hessians(layer.index, layer.linears, groups)[::-1]
    recipes = {name: _with_codec(task, name, recipe) for name in names}
    shapes = {name: _shape(layer.linears[name]) for name in names}
    spread = Spread.of(groups, shapes, recipes, task.processes)
    made: list[PackedMatrix] = []
    for group in groups:
        made += _quantize_group(task, group, waiting.pop(), recipe, spread)
    results = _all_of(spread, groups, made)
    # One after the other, since those of a chunk of experts are large.
    for result in results:
        if recipe.hessian.refresh == "group":
            _install([result], layer)
        if not task.trainer:
            del layer.weights[result.name]
    return results


def _shape(linear: nn.Linear) -> tuple[int, int]:
    return linear.out_features, linear.in_features


def _with_codec(task: LayerTask, name: str, recipe: Recipe) -> Recipe:
    """The recipe with the codec that a linear got from a budget, if there is one."""
    allocated = task.allocation.get(name)
    return recipe if allocated is None else recipe.with_codec(allocated.codec)


def _quantize_group(
    task: LayerTask, group: InputGroup, hessian: InputHessian, recipe: Recipe, spread: Spread
) -> list[PackedMatrix]:
    """Quantize the linears of a group that this process has, and let go of all that is not needed
    any more: for an expert of 14336 features, H alone is 0.8 GB."""
    layer, allocation = task.layer, task.allocation
    # Of all experts no token reached one, or others quantize these.
    if not hessian.is_known or not any(spread.is_here(name) for name in group.names):
        return []
    W = {name: layer.weights[name].float() for name in group.names}
    H_CC, num_tokens = hessian.matrix(group.names[0]), hessian.num_tokens
    statistics = Statistics(H_CC, num_tokens, hessian.drift, task.outputs)
    del hessian
    codecs = {name: allocation[name].codec for name in W if name in allocation}
    trained = task.trainer.weights(group.names) if task.trainer else None
    made = quantize_group(W, statistics, recipe, codecs, trained, task.cuts, spread)
    made = [_placed(own, task) for own in made]
    # Those of experts are decoded again where they are needed: all of a layer take much memory.
    return [replace(own, decoded_RC=None) for own in made] if group.side else made


def _all_of(
    spread: Spread, groups: list[InputGroup], made: list[PackedMatrix]
) -> list[PackedMatrix]:
    """The linears of all processes, decoded here but for those of experts."""
    names = [name for group in groups for name in group.names]
    of_experts = {name for group in groups if group.side for name in group.names}
    return [
        result
        if result.decoded_RC is not None or result.name in of_experts
        else replace(result, decoded_RC=result.W_hat_RC)
        for result in spread.gather(names, made)
    ]


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
