"""The quantization loop: one decoder layer at a time, from calibration to a written shard."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vqllm.allocation.run import Allocated, Foresight
from vqllm.calibration.data.calibration_set import calibration_sequences
from vqllm.calibration.layer_calibrator import InputGroup, LayerCalibrator
from vqllm.calibration.layer_stream import linears_of
from vqllm.calibration.passes import Model
from vqllm.checkpoint.resume.layer_writer import CheckpointRun
from vqllm.core import memory
from vqllm.core.progress import Progress
from vqllm.core.protocols import JSON
from vqllm.errors import ModelError
from vqllm.plan.job import Job
from vqllm.plan.not_quantized import nothing_to_quantize, why_not_quantized
from vqllm.plan.packed_spec import stored_spec
from vqllm.plan.selection import chosen, shapes_of
from vqllm.quantization.checks import check_finite, check_model
from vqllm.quantization.embeddings import Outside
from vqllm.quantization.layer_training import (
    LayerTrainer,
    Place,
    TrainedLayer,
    vectors_of,
)
from vqllm.quantization.linear import QuantizedLinear, Statistics, quantize_group
from vqllm.recipes import Recipe, TuningRecipe


@dataclass(frozen=True)
class Outcome:
    """What the loop produced beside the checkpoint itself."""

    records: list[JSON]
    not_quantized: dict[str, str]
    seconds: dict[str, float]
    held_out: Tensor
    """int64 [S, L], sequences that nothing was calibrated on"""


def open_run(job: Job) -> CheckpointRun:
    """The job's output folder, new or with the finished layers of an earlier run of the same job.

    Raises:
        ModelError: a run would fail on this model; nothing is written then.
        CheckpointError: something else is in the folder; a difference to the earlier run is shown.
    """
    check_model(job.source, job.model, job.recipe, job.trust_remote_code)
    settings = {"device": job.device.type, "compute_dtype": str(job.compute_dtype or "auto")}
    return CheckpointRun(
        job.output,
        job.source,
        job.model,
        job.recipe.to_dict(),
        settings,
        job.trust_remote_code,
        origin=job.origin,
    )


def quantize(job: Job, run: CheckpointRun, progress: Progress) -> Outcome:
    """Quantize a model into the checkpoint folder of `run`, from its first unfinished layer on.

    Every finished layer is on disk before the next one begins; a run that is killed at any moment
    and started again writes the same bytes as one that was not.
    """
    recipe, start = job.recipe, time.perf_counter()
    memory.keep_large_blocks_apart()
    progress.phase("calibration text")
    sequences = run.load_or_make(
        "sequences",
        lambda: sequences_of(job.source, recipe, job.device, job.trust_remote_code),
    )
    calibrated = time.perf_counter()
    foresight = Foresight(job, run, sequences["calibration"], progress)
    stream = job.open_stream(run.scratch)
    check_finite(stream.model, "the model outside its layers")
    outside = Outside(stream, run, recipe)
    shapes = shapes_of(stream, recipe)
    allocation = foresight.allocation(shapes)
    planned = {
        name: stored_spec(
            *shape,
            recipe.with_codec(allocation[name].codec if name in allocation else recipe.codec),
        )
        for name, shape in shapes.items()
    }
    run.begin(stream.model, stream.names, planned | outside.specs, outside.tied)
    outside.quantize_embedding(sequences["calibration"], progress)
    calibrator = LayerCalibrator(
        stream,
        sequences["calibration"],
        job.activation_budget,
        run.scratch,
        foresight.token_weights(),
        recipe.target.of,
        _aims(recipe),
    )
    progress.layers(len(stream), run.num_finished)
    unfinished = run.num_finished < len(stream) or outside.head_is_due
    for index, layer_name in enumerate(stream.names if unfinished else []):
        with stream.layer(index) as layer:
            linears = chosen(linears_of(layer, layer_name, stream.shared), recipe)
            weights = {name: linear.weight.data for name, linear in linears.items()}
            moving: dict[str, Place] = {}
            if recipe.layer and "vectors" in recipe.layer.train:
                moving = vectors_of(layer, layer_name, stream.shared, run.has)
            vectors = {name: place.parameter for name, place in moving.items()}
            stored = {name: vector.data for name, vector in vectors.items()}
            check_finite(layer, layer_name, linears.values())
            layer.to(stream.compute_dtype)
            calibrator.begin(linears, vectors.values())
            is_finished = index < run.num_finished
            if not is_finished:
                trainer = None
                if recipe.layer and linears:
                    whole = TrainedLayer(index, layer_name, linears, weights, moving, stored)
                    trainer = LayerTrainer(recipe.layer, recipe.seed, whole, calibrator)
                outputs = foresight.outputs(index)
                task = _Layer(index, layer, linears, weights, outputs, allocation, trainer)
                results = _quantize_layer(task, calibrator, recipe, progress)
                run.write_layer(index, results, trainer.vectors() if trainer else {})
            if is_finished or recipe.layer:
                for name, W_hat_RC in run.decoded(index):
                    _install(linears[name], "weight", W_hat_RC)
                for name, values in run.vectors(index, vectors).items():
                    _install(moving[name].module, moving[name].key, values)
            if index + 1 < len(stream):
                calibrator.advance(index)
            elif outside.head_is_due:
                outside.measure_head(calibrator, index)
        progress.layer(index, run.records(index))
    calibrator.close()
    outside.quantize_head(progress)
    progress.phase("writing the rest of the model")
    quantized = {*run.quantized, *outside.names}
    kept = why_not_quantized(stream.model, stream.names, quantized, recipe.skip)
    if not run.quantized:
        raise ModelError(f"nothing in {job.model} was quantized: {nothing_to_quantize(kept)}")
    run.finish(kept, outside.results, outside.tied)
    seconds = {
        "calibration text": calibrated - start,
        "quantization": time.perf_counter() - calibrated,
    }
    records = run.all_records() + [result.record for result in outside.results]
    return Outcome(records, kept, seconds, sequences["held_out"])


@dataclass(frozen=True)
class _Layer:
    """A loaded layer that is to be quantized."""

    index: int
    module: nn.Module
    linears: Mapping[str, nn.Linear]
    weights: Mapping[str, Tensor]
    """as the source stores them"""
    outputs: Mapping[str, Tensor]
    """packed H_O, where the rounding rule needs them"""
    allocation: Mapping[str, Allocated]
    """of all linears of the model, where bits are allocated"""
    trainer: LayerTrainer | None


def _quantize_layer(
    layer: _Layer, calibrator: LayerCalibrator, recipe: Recipe, progress: Progress
) -> list[QuantizedLinear]:
    """Quantize the linears of a loaded layer, and install the decoded weights in it.

    With `refresh: group` the Hessian of each input group is measured after the groups that run
    before it are quantized; with `refresh: layer` all are measured on the unquantized layer.
    """
    groups = calibrator.groups(layer.index, layer.linears)
    stages = [[group] for group in groups] if recipe.hessian.refresh == "group" else [groups]
    results: list[QuantizedLinear] = []
    unfinished = dict(layer.linears)
    for stage in stages:
        done = _quantize_stage(layer, stage, calibrator, recipe)
        names = [name for group in stage for name in group.names]
        if layer.trainer:
            layer.trainer.train(names, done)
        for quantized in done:
            progress.linear(quantized.record)
        results += done
        for name in names:
            del unfinished[name]
        # Nothing is settled before the last training; after it, or with nothing unfinished, only
        # the output of the layer is left to compute.
        if unfinished and not layer.trainer:
            calibrator.settle(layer.module, unfinished.values())
    return layer.trainer.finished(results) if layer.trainer else results


def _quantize_stage(
    layer: _Layer, groups: list[InputGroup], calibrator: LayerCalibrator, recipe: Recipe
) -> list[QuantizedLinear]:
    results: list[QuantizedLinear] = []
    for group, hessian in zip(groups, calibrator.hessians(layer.index, layer.linears, groups)):
        if hessian.num_tokens == 0:
            continue
        W = {name: layer.weights[name].float() for name in group.names}
        statistics = Statistics(
            hessian.matrix(group.names[0]), hessian.num_tokens, hessian.drift, layer.outputs
        )
        codecs = {name: layer.allocation[name].codec for name in W if name in layer.allocation}
        trained = layer.trainer.weights(group.names) if layer.trainer else None
        results += quantize_group(W, statistics, recipe, codecs, trained)
    for quantized in results:
        quantized.record["layer"] = layer.index
        if quantized.name in layer.allocation:
            quantized.record["expected_kl"] = layer.allocation[quantized.name].expected_kl
        _install(layer.linears[quantized.name], "weight", quantized.W_hat_RC)
    return results


def _install(module: nn.Module, key: str, values: Tensor) -> None:
    """Let the layer run with what a reader will decode."""
    parameter = module.get_parameter(key)
    parameter.data = values.to(parameter.device, parameter.dtype)


def _aims(recipe: Recipe) -> Model | None:
    """The model for whose input the unquantized layer's output is the aim of training."""
    if recipe.layer is None:
        return None
    return "original" if recipe.layer.aim == "original" else "quantized"


def sequences_of(
    source: Path, recipe: Recipe | TuningRecipe, device: torch.device, trust_remote_code: bool
) -> dict[str, Tensor]:
    """The token sequences of a run, int64 [S, L]: to calibrate or tune on, and held out."""
    calibration = recipe.calibration
    sequences = calibration_sequences(
        source,
        calibration.source,
        calibration.num_sequences,
        calibration.length,
        recipe.seed,
        device,
        trust_remote_code,
    )
    return {"calibration": sequences.calibration, "held_out": sequences.held_out}
