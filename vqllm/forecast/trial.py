"""A layer of the model that is really calibrated and rounded, a linear of each shape."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from vqllm.calibration.hessian import InputGroup, InputHessian
from vqllm.calibration.layer_calibrator import LayerCalibrator
from vqllm.calibration.layer_stream import LayerStream
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
from vqllm.quantization.layer import in_stages, measured_groups
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
    memory.restart_peak()
    stream = job.open_stream()
    tried = _Tried(job, checked, tokens, found, codecs, stream, folder)
    for before in range(index + 1):
        start = time.perf_counter()
        with stream.layer(before) as module:
            linears = checked.selection.of(linears_of(module, stream.names[before], stream.shared))
            weights = {name: linear.weight.data for name, linear in linears.items()}
            stream.cast(before)
            tried.trial.loading = time.perf_counter() - start
            tried.calibrator.begin(linears)
            if before == index:
                tried.round(index, module, linears, weights)
            with tried.clock.running("forward"):
                tried.calibrator.advance(before)
    tried.calibrator.close()
    trial, num = tried.trial, tokens.numel()
    trial.forward = tried.clock.last / num
    trial.passes = tried.clock.totals.get("passes", 0.0) / num + trial.forward
    trial.peak_bytes = memory.peak_resident()
    return trial


class _Tried:
    """The layer on its way, with what is measured of it."""

    def __init__(
        self,
        job: Job,
        checked: Checked,
        tokens: Tensor,
        found: PassMeasured | None,
        codecs: Mapping[Shape, Codec],
        stream: LayerStream,
        folder: Path,
    ) -> None:
        self._recipe, self._cuts, self._codecs = job.recipe, checked.selection.cuts, codecs
        self._outputs = found.outputs if found else {}
        self.trial, self.clock = Trial(), _Clock()
        self.calibrator = LayerCalibrator(
            stream,
            tokens,
            job.activation_budget,
            folder,
            found.weights if found else None,
            job.recipe.target.of,
            None,
            job.recipe.hessian.expert_shrinkage,
        )

    def round(
        self,
        index: int,
        module: nn.Module,
        linears: Mapping[str, nn.Linear],
        weights: Mapping[str, Tensor],
    ) -> None:
        """Measure every input group as a run does, and round a linear of each shape."""
        calibrator = self.calibrator
        stages = in_stages(calibrator.groups(index, linears))
        self.trial.num_stages = len(stages)
        measured = measured_groups(calibrator, index, module, linears, stages)
        while True:
            with self.clock.running("passes"):
                found = next(measured, None)
            if found is None:
                break
            group, hessian = found
            if hessian.is_known:
                self._round_group(group, hessian, linears, weights)

    def _round_group(
        self,
        group: InputGroup,
        hessian: InputHessian,
        linears: Mapping[str, nn.Linear],
        weights: Mapping[str, Tensor],
    ) -> None:
        """Round the linears of a group whose shapes are new."""
        H_CC, num = hessian.matrix(group.names[0]), hessian.num_tokens
        known = Statistics(H_CC, num, hessian.drift, self._outputs)
        for name in group.names:
            W_RC = weights[name].float()
            shape = (W_RC.shape[0], W_RC.shape[1])
            if shape in self.trial.rounding:
                continue
            own = {name: self._codecs[shape]} if shape in self._codecs else None
            start = time.perf_counter()
            (made,) = quantize_group({name: W_RC}, known, self._recipe, own, None, self._cuts)
            self.trial.rounding[shape] = time.perf_counter() - start
            if not any(transform.type == "hadamard" for transform in self._recipe.transforms):
                self.trial.errors[shape] = _error(name, W_RC, self._recipe)
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
