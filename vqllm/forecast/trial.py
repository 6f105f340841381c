"""A layer of the model that is really calibrated and rounded, a linear of each shape."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vqllm.calibration.layer_calibrator import InputGroup, LayerCalibrator
from vqllm.core import memory, threads
from vqllm.core.protocols import Codec
from vqllm.core.tiles import to_tiles
from vqllm.forecast.gradients import PassMeasured
from vqllm.hf.decoder_layers import linears_of
from vqllm.plan.costs import Shape
from vqllm.plan.job import Job
from vqllm.plan.packed_spec import transformed
from vqllm.quantization.checks import Checked
from vqllm.quantization.encode import fit
from vqllm.quantization.layer import HESSIAN_BYTES, stages
from vqllm.quantization.linear import Statistics, quantize_group
from vqllm.quantization.loaded_layer import install
from vqllm.recipes import Recipe


@dataclass
class Trial:
    """What one layer took and lost."""

    passes: float = 0.0
    """seconds a token for all passes through the layer"""
    forward: float = 0.0
    """seconds a token for the last one, from its input to its output"""
    loading: float = 0.0
    """seconds"""
    rounding: dict[Shape, float] = field(default_factory=dict)
    """seconds for a linear of each shape"""
    errors: dict[Shape, float] = field(default_factory=dict)
    """relative squared error of the codes, where no transform makes weights Gaussian"""
    num_stages: int = 1
    """input groups that are rounded one after the other"""
    peak_bytes: int = 0

    def seconds_of(self, shape: Shape) -> float:
        """For a linear of any shape; of one that was not tried, as for those that were."""
        if shape in self.rounding:
            return self.rounding[shape]
        weights = sum(rows * cols for rows, cols in self.rounding)
        return sum(self.rounding.values()) / max(1, weights) * shape[0] * shape[1]


def try_layer(
    job: Job,
    checked: Checked,
    tokens: Tensor,
    index: int,
    found: PassMeasured | None,
    codecs: Mapping[Shape, Codec],
    folder: Path,
) -> Trial:
    """Calibrate and round.

    Args:
        tokens: int64 [S, L].
        index: the layer.
        found: what the pass with gradients found, where there was one.
        codecs: of linears of each shape, where the recipe has several.
        folder: for activations.
    """
    recipe, trial = job.recipe, Trial()
    memory.restart_peak()
    stream = job.open_stream()
    calibrator = LayerCalibrator(
        stream,
        tokens,
        job.activation_budget,
        folder,
        found.weights if found else None,
        recipe.target.of,
        None,
        recipe.hessian.expert_shrinkage,
    )
    clock = _Clock()
    for before in range(index + 1):
        start = time.perf_counter()
        with stream.layer(before) as module:
            own = linears_of(module, stream.names[before], stream.shared)
            linears = checked.selection.of(own)
            weights = {name: linear.weight.data for name, linear in linears.items()}
            stream.cast(before)
            trial.loading = time.perf_counter() - start
            calibrator.begin(linears)
            if before == index:
                groups = calibrator.groups(index, linears)
                unfinished, trial.num_stages = dict(linears), len(stages(groups))
                for stage in stages(groups):
                    for chunk in calibrator.chunks(linears, stage, HESSIAN_BYTES):
                        with clock.running("passes"):
                            hessians = calibrator.hessians(index, linears, chunk)
                        for group, hessian in zip(chunk, hessians):
                            if not hessian.is_known:
                                continue
                            H_CC = hessian.matrix(group.names[0])
                            known = Statistics(
                                H_CC,
                                hessian.num_tokens,
                                hessian.drift,
                                found.outputs if found else {},
                            )
                            _round(job, checked, group, weights, known, codecs, trial, linears)
                    for group in stage:
                        for name in group.names:
                            del unfinished[name]
                    if unfinished:
                        with clock.running("passes"):
                            calibrator.settle(module, unfinished.values())
            with clock.running("forward"):
                calibrator.advance(before)
    calibrator.close()
    num = tokens.numel()
    trial.forward = clock.last / num
    trial.passes = clock.totals.get("passes", 0.0) / num + trial.forward
    trial.peak_bytes = memory.peak_resident()
    return trial


def _round(
    job: Job,
    checked: Checked,
    group: InputGroup,
    weights: Mapping[str, Tensor],
    known: Statistics,
    codecs: Mapping[Shape, Codec],
    trial: Trial,
    linears: Mapping[str, torch.nn.Linear],
) -> None:
    """Round the linears of a group whose shapes are new."""
    for name in group.names:
        shape = (weights[name].shape[0], weights[name].shape[1])
        if shape in trial.rounding:
            continue
        own = {name: codecs[shape]} if shape in codecs else None
        start = time.perf_counter()
        (made,) = quantize_group(
            {name: weights[name].float()},
            known,
            job.recipe,
            own,
            None,
            checked.selection.cuts,
        )
        trial.rounding[shape] = time.perf_counter() - start
        if not any(transform.type == "hadamard" for transform in job.recipe.transforms):
            trial.errors[shape] = _error(name, weights[name].float(), job.recipe)
        install(linears[name], "weight", made.W_hat_RC)


def _error(name: str, W_RC: Tensor, recipe: Recipe) -> float:
    """The squared error of the codec alone on weights as they are, relative to them."""
    one_CC = torch.eye(W_RC.shape[1], device=W_RC.device)
    linears, _ = transformed({name: W_RC}, one_CC, recipe)
    X_IJE = to_tiles(linears[name].W_RC, recipe.codec.tile)
    state = fit(name, recipe, linears[name].W_RC, one_CC)
    X_hat_IJE = recipe.codec.decode(recipe.codec.encode(X_IJE, state), state)
    error, energy = (threads.total(X.double().square()) for X in (X_hat_IJE - X_IJE, X_IJE))
    return float(error / energy)


class _Clock:
    """Seconds by name, and those of the last interval."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self.last = 0.0

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.last = time.perf_counter() - start
        self.totals[name] = self.totals.get(name, 0.0) + self.last
