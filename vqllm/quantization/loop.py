"""The quantization loop: one decoder layer at a time, from calibration to a written shard."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vqllm.allocation.gradient_statistics import GradientStatistics
from vqllm.calibration.data.calibration_set import calibration_sequences
from vqllm.calibration.layer_calibrator import LayerCalibrator
from vqllm.calibration.passes import Model
from vqllm.checkpoint.resume.layer_writer import LayerWriter
from vqllm.checkpoint.resume.shared_run import SharedRun
from vqllm.core import memory
from vqllm.core.coverage import kinds_of
from vqllm.core.progress import Progress
from vqllm.core.protocols import JSON
from vqllm.errors import ModelError
from vqllm.hf.decoder_layers import linears_of
from vqllm.plan.job import Job
from vqllm.plan.not_quantized import why_not_quantized
from vqllm.plan.specs import planned_specs
from vqllm.quantization.checks import Checked, check_finite, check_model, say_what_stays
from vqllm.quantization.embeddings import EmbeddingAndHead
from vqllm.quantization.layer import LayerTask, quantize_layer
from vqllm.quantization.layer_training import LayerTrainer
from vqllm.quantization.loaded_layer import LoadedLayer, Place, install, vectors_of
from vqllm.recipes import Recipe, TuningRecipe
from vqllm_kernels.linear import LinearSpec


@dataclass(frozen=True)
class Outcome:
    """What the loop produced beside the checkpoint itself."""

    records: list[JSON]
    not_quantized: dict[str, str]
    seconds: dict[str, float]
    held_out: Tensor
    """int64 [S, L], sequences that nothing was calibrated on"""


def check(job: Job) -> Checked:
    """The model. ModelError: a run would fail on it."""
    return check_model(job.source, job.model, job.recipe, job.trust_remote_code)


def open_run(job: Job) -> LayerWriter:
    """The output folder of a job whose model was checked, new or with the finished layers of an
    earlier run of the same job.

    Raises:
        CheckpointError: something else is in the folder; a difference to the earlier run is shown.
    """
    settings = {"device": job.device.type, "compute_dtype": str(job.compute_dtype or "auto")}
    return LayerWriter(
        job.output,
        job.source,
        job.model,
        job.recipe.to_dict(),
        settings,
        job.trust_remote_code,
        origin=job.origin,
        private=job.is_part,
    )


@memory.old_objects_kept()
def quantize(job: Job, run: SharedRun, checked: Checked, progress: Progress) -> Outcome:
    """Quantize a model into the checkpoint folder of `run`, from its first unfinished layer on.
    `checked` is what `check` returns. All processes of `run` call this.

    Every finished layer is on disk before the next one begins; a run that is killed at any moment
    and started again writes the same bytes as one that was not.
    """
    start = time.perf_counter()
    memory.keep_large_blocks_apart()
    say_what_stays(job.model, checked, job.recipe)
    progress.phase("calibration text")
    sequences = run.load_or_make(
        "sequences",
        lambda: sequences_of(job.source, job.recipe, job.device, job.trust_remote_code),
    )
    calibrated = time.perf_counter()

    loop = _Loop(job, run, checked, sequences["calibration"], progress)
    loop.quantize_embedding()
    loop.begin_layers()
    for index in loop.layers_to_load():
        with loop.loaded(index) as layer:
            if index < run.num_finished:
                loop.replay(layer)
            else:
                loop.quantize(layer)
            loop.advance(layer)
        progress.layer(index, run.records(index))
    loop.quantize_head()
    not_quantized = loop.write_the_rest()

    seconds = {
        "calibration text": calibrated - start,
        "quantization": time.perf_counter() - calibrated,
    }
    return Outcome(loop.records(), not_quantized, seconds, sequences["held_out"])


class _Loop:
    """The steps of a run. Making it measures gradients, if the recipe needs them, and plans."""

    def __init__(
        self,
        job: Job,
        run: SharedRun,
        checked: Checked,
        tokens_SL: Tensor,
        progress: Progress,
    ) -> None:
        self._job, self._recipe, self._run, self._progress = job, job.recipe, run, progress
        self._selection, self._tokens_SL = checked.selection, tokens_SL
        # The pass with gradients opens the model by itself, so it comes before the stream.
        self._findings = GradientStatistics(job, run, self._selection, tokens_SL, progress)
        self._stream = job.open_stream(checked.tensors)
        check_finite(self._stream.model, "the model outside its layers")
        self._ends = EmbeddingAndHead(self._stream, run, self._recipe)
        self._allocation = self._findings.allocation()
        planned = self._planned_specs() | self._ends.specs
        run.begin(self._stream.tensors, self._stream.names, planned, self._ends.tied)

    def _planned_specs(self) -> dict[str, LinearSpec]:
        """How each linear of the layers will be stored."""
        codecs = {name: allocated.codec for name, allocated in self._allocation.items()}
        return planned_specs(self._selection, self._recipe, codecs)

    def quantize_embedding(self) -> None:
        """An embedding that is not tied comes first: the layers see its decoded rows."""
        self._ends.quantize_embedding(self._tokens_SL, self._progress)

    def begin_layers(self) -> None:
        """Make ready what runs the calibration sequences through the layers."""
        self._calibrator = LayerCalibrator(
            self._stream,
            self._tokens_SL,
            self._job.activation_budget,
            self._run.scratch,
            self._findings.token_weights(),
            self._recipe.target.of,
            _aims(self._recipe),
            self._recipe.hessian.expert_shrinkage,
            self._run.processes,
        )
        self._progress.layers(len(self._stream), self._run.num_finished)

    def layers_to_load(self) -> range:
        """All of them, since the inputs of a layer are outputs of those before it; none if
        everything is finished."""
        num = len(self._stream)
        return range(num if self._run.num_finished < num or self._ends.head_is_due else 0)

    @contextmanager
    def loaded(self, index: int) -> Iterator[LoadedLayer]:
        """A layer in memory, checked, with its inputs ready."""
        recipe, stream, name = self._recipe, self._stream, self._stream.names[index]
        with stream.layer(index) as module:
            linears = self._selection.of(linears_of(module, name, stream.shared))
            weights = {name: linear.weight.data for name, linear in linears.items()}
            moving: dict[str, Place] = {}
            if recipe.layer and "vectors" in recipe.layer.train:
                moving = vectors_of(module, name, stream.shared, self._run.has)
            vectors = {name: place.parameter.data for name, place in moving.items()}
            check_finite(module, name, linears.values())
            stream.cast(index)
            self._calibrator.begin(linears, [place.parameter for place in moving.values()])
            yield LoadedLayer(index, name, module, linears, weights, moving, vectors)

    def quantize(self, layer: LoadedLayer) -> None:
        """Quantize a layer and write its shard."""
        recipe, trainer = self._recipe, None
        if recipe.layer and layer.linears:
            trainer = LayerTrainer(recipe.layer, recipe.seed, layer, self._calibrator)
        outputs = self._findings.outputs(layer.index)
        cuts, processes = self._selection.cuts, self._run.processes
        task = LayerTask(layer, outputs, self._allocation, trainer, cuts, processes)
        results = quantize_layer(task, self._calibrator, recipe, self._progress)
        self._run.write_layer(layer.index, results, trainer.vectors() if trainer else {})
        if trainer:
            self.replay(layer)  # scales and vectors as they were rounded to their stored dtypes

    def replay(self, layer: LoadedLayer) -> None:
        """Let a layer run with what its shard holds."""
        for name, W_hat_RC in self._run.decoded(layer.index):
            install(layer.linears[name], "weight", W_hat_RC)
        for name, values in self._run.vectors(layer.index, layer.moving).items():
            install(layer.moving[name].module, layer.moving[name].key, values)

    def advance(self, layer: LoadedLayer) -> None:
        """Compute the inputs of the next layer; after the last one, H of the head's input."""
        if layer.index + 1 < len(self._stream):
            self._calibrator.advance(layer.index)
        elif self._ends.head_is_due:
            self._ends.measure_head(self._calibrator, layer.index)

    def quantize_head(self) -> None:
        """The output head, and the embedding if they are one matrix, come last."""
        self._calibrator.close()
        self._ends.quantize_head(self._progress)

    def write_the_rest(self) -> dict[str, str]:
        """Write all that is not quantized; why it is not, by module.

        Raises:
            ModelError: nothing was quantized.
        """
        self._progress.phase("writing the rest of the model")
        return self._run.write_in_first(self._write_the_rest)

    def _write_the_rest(self, folder: LayerWriter) -> dict[str, str]:
        quantized = {*folder.quantized, *self._ends.names}
        reasons = why_not_quantized(
            self._stream.model,
            self._stream.names,
            quantized,
            self._recipe.skip,
            self._selection.kept,
        )
        if not folder.quantized:
            raise ModelError(f"nothing in {self._job.model} was quantized: {kinds_of(reasons)}")
        folder.finish(reasons, self._ends.results, self._ends.tied)
        return reasons

    def records(self) -> list[JSON]:
        """The lines of the report; none in other processes than the first."""
        ends = [result.record.to_dict() for result in self._ends.results]
        return self._run.all_records() + ends


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
