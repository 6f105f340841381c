"""Tuning a quantized checkpoint against the model that it was made from."""

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqllm.calibration.data.calibration_set import SELF
from vqllm.calibration.data.text_sources import open_source
from vqllm.calibration.hidden_layers import HiddenLayers
from vqllm.calibration.layer_stream import LayerStream
from vqllm.calibration.layers import Layers
from vqllm.checkpoint.inspect import bits_per_weight, parameter_counts
from vqllm.checkpoint.reader import Checkpoint
from vqllm.checkpoint.resume.journal import WORK
from vqllm.checkpoint.resume.tuned_writer import TunedWriter
from vqllm.core import memory
from vqllm.core.distributed import Processes
from vqllm.core.progress import Progress
from vqllm.core.protocols import JSON
from vqllm.distillation.cached_predictions import StreamedPredictions, windows_name
from vqllm.distillation.student import Student
from vqllm.evaluation import perplexity as evaluation
from vqllm.models.load import load_to_run
from vqllm.report.pages import report_pages
from vqllm.report.summary import Summary
from vqllm.runs import originals
from vqllm.runs.hooks import Hooks
from vqllm.runs.measure import Windows, held_out_windows
from vqllm.runs.out_of_memory import memory_explained
from vqllm.runs.teacher_check import check_folders
from vqllm.runs.tuning_job import TuningJob, check_shard, open_tuned_run
from vqllm.tuning.base import ModelTask

logger = logging.getLogger(__name__)


def run(
    job: TuningJob,
    windows: Windows | None,
    evaluate: bool,
    command: str,
    progress: Progress,
    *,
    hooks: Hooks | None = None,
) -> Summary | None:
    """Tune, measure and write the pages, going on where an earlier run of the job stopped.

    Args:
        windows: what the result is measured on; None takes the held-out sequences.
        evaluate: False leaves it unmeasured.
        command: what the pages say the checkpoint was made with.

    Returns:
        None in all but the first of several processes that share the work.

    Raises:
        VqllmError: a mistake that the message explains; the last saved state stays.
    """
    hooks = hooks or Hooks()
    # What is wrong with the command is found before a folder is begun.
    for name in job.recipe.calibration.source:
        if name != SELF:
            open_source(name)
    processes = Processes.started(job.device)
    check_shard(job.recipe, processes, job.within)
    if job.recipe.shard:
        # Weights come and go with every call: 335 MB of matrices of 8 MB, split over two processes,
        # left holes of 1.3 GB in two steps, and none with this.
        memory.keep_large_blocks_apart()
    with ExitStack() as stack, memory_explained(job):
        check_folders(job.checkpoint.folder, job.teacher.path, job.trust_remote_code)
        # Only the first process writes.
        folder = processes.on_first(lambda: stack.enter_context(open_tuned_run(job, processes)))
        if folder is not None:
            hooks.prepare(folder, job.recipe, job.make_sequences)
        return _TuningRun(job, folder, processes, progress).run(windows, evaluate, command, hooks)


class _TuningRun:
    """A run in its folder, which only the first process has."""

    def __init__(
        self, job: TuningJob, folder: TunedWriter | None, processes: Processes, progress: Progress
    ) -> None:
        self._job, self._folder = job, folder
        self._processes, self._progress = processes, progress
        self._scratch = job.output / WORK
        """of the folder, in all processes"""

    def run(
        self, windows: Windows | None, evaluate: bool, command: str, hooks: Hooks
    ) -> Summary | None:
        job, start = self._job, time.perf_counter()
        self._phase("calibration text")
        # Before the models are loaded: a source that is the model itself is one more in memory.
        sequences = self._processes.broadcast(self._sequences)
        student = self._student(self._load(job.checkpoint.folder)[0])
        # Predictions of the original, of all sequences that something will ask for.
        follows = not all(stage.by_layers for stage in job.recipe.stages)
        asked = [sequences["calibration"]] if follows else []
        teacher = None
        if follows or (evaluate and hooks.measure is None and windows is None):
            teacher = self._teacher(torch.cat([*asked, sequences["held_out"]]))
        # The tuned checkpoint, complete but for the pages about it.
        reports = self._tune(student, teacher, sequences)
        if self._folder is not None:
            originals.remember(job.output, job.teacher.origin, command, job.recipe.to_dict())
        del student  # what was written is measured
        self._processes.leave()
        if self._folder is None:
            return None
        seconds = {"tuning": time.perf_counter() - start}
        # Its measurement.
        measured = None
        if evaluate:
            self._phase("evaluation against the original")
            start = time.perf_counter()
            if hooks.measure is None:
                measured = self._measured(teacher, windows, sequences["held_out"])
            else:
                del teacher  # a live one would be the original's second copy in memory
                measured = hooks.measure(sequences["held_out"])
            seconds["evaluation"] = time.perf_counter() - start
        # The pages, with which the run is over.
        summary = _summary(job, command, seconds, measured, reports)
        hooks.finish(summary)
        records = list(Checkpoint.open(job.output, verify=False).records().values())
        self._folder.complete(report_pages(records, summary, job.recipe.to_yaml(with_paths=False)))
        return summary

    def _measured(self, teacher: Any, windows: Windows | None, held_out_SL: Tensor) -> JSON:
        """The written checkpoint against the original."""
        job = self._job
        if windows is not None and (job.recipe.teacher == "cached" or teacher is None):
            self._processes = Processes()  # the others are gone
            teacher = self._teacher(windows.tokens_SL, windows_name(windows.tokens_SL))
        tuned, _ = self._load(job.output)
        chosen = windows or held_out_windows(job.recipe, held_out_SL)
        return evaluation.compare(tuned, teacher, chosen.tokens_SL, chosen.label).to_dict()

    def _load(self, folder: Path) -> tuple[Any, Any]:
        """In bfloat16 everywhere: gradients of a mean over many positions underflow in float16."""
        return load_to_run(folder, self._job.device, self._job.trust_remote_code, torch.bfloat16)

    def _teacher(self, tokens_SL: Tensor, name: str = "teacher") -> Any:
        """The original, or what stands for it where these sequences are all that it is given."""
        if self._job.recipe.teacher == "live":
            return self._load(self._job.teacher.path)[0]
        self._phase("predictions of the original")
        return StreamedPredictions(
            self._open_original, tokens_SL, self._scratch, self._processes, self._share, name
        )

    def _open_original(self) -> LayerStream:
        """The original, a layer at a time."""
        job = self._job
        return LayerStream(job.teacher.path, job.device, torch.bfloat16, job.trust_remote_code)

    def _phase(self, text: str) -> None:
        if self._processes.is_first:
            self._progress.phase(text)

    def _share(self, done: float) -> None:
        if self._processes.is_first:
            self._progress.share(done)

    def _sequences(self) -> dict[str, Tensor]:
        assert self._folder is not None
        return self._folder.load_or_make("sequences", self._job.make_sequences)

    def _student(self, model: Any) -> Student:
        """The quantized model with what the stages train as its parameters."""
        kinds = {kind for stage in self._job.recipe.stages for kind in stage.kinds}
        shared_by = self._processes if self._job.recipe.shard else None
        student = Student(model, self._job.checkpoint, kinds, shared_by)
        for stage in self._job.recipe.stages:
            stage.check(student.parameters)
        if student.not_stored and self._processes.is_first:
            logger.warning(
                "%d tensors are not stored under the names that the model uses, and stay as they "
                "are: %s",
                len(student.not_stored),
                ", ".join(student.not_stored[:3]),
            )
        if self._job.device.type == "cpu":
            # The gradient of the plain attention is 1.3 times as fast there as that of torch's
            # fused one: 1042 against 791 tokens a second (demo model, 16 x 128, two cores).
            model.set_attn_implementation("eager")
        return student

    def _tune(self, student: Student, teacher: Any, sequences: Mapping[str, Tensor]) -> list[JSON]:
        """Write the tuned checkpoint; what the stages say about themselves."""
        reports = self._stages(student, teacher, sequences)
        self._phase("writing the tuned model")
        self._processes.on_first(lambda: self._write(student))
        return reports

    def _stages(
        self, student: Student, teacher: Any, sequences: Mapping[str, Tensor]
    ) -> list[JSON]:
        """Run one stage after the other; what each says about itself."""
        reports = []
        for number, stage in enumerate(self._job.recipe.stages):
            # A stage goes on from where the one before left the student.
            self._phase(f"tuning: {stage.type}")
            student.recompute(stage.recomputes)
            task = ModelTask(
                student=student.logits,
                teacher=lambda tokens: teacher(input_ids=tokens, use_cache=False).logits,
                parameters=student.parameters,
                codes=student.codes,
                linears=student.linears,
                sequences=sequences["calibration"],
                held_out=sequences["held_out"],
                seed=self._job.recipe.seed,
                device=self._job.device,
                states=_FolderStates(self._folder, self._processes, f"stage-{number}"),
                report_progress=self._share,
                processes=self._processes,
                in_step=self._job.recipe.shard,
                student_layers=lambda names: HiddenLayers(
                    Layers(student.model, names, self._job.device)
                ),
                teacher_layers=lambda: HiddenLayers(self._open_original()),
            )
            reports.append({"stage": stage.type, **stage(task)})
        return reports

    def _write(self, student: Student) -> None:
        assert self._folder is not None
        changes = student.changes()
        record = {"recipe": self._job.recipe.to_dict(), "teacher": self._job.teacher.origin}
        self._folder.write(changes.specs, changes.packed, changes.others, record)


class _FolderStates:
    """The states of one stage in the folder of a run."""

    def __init__(self, folder: TunedWriter | None, processes: Processes, name: str) -> None:
        self._folder, self._processes, self._name = folder, processes, name

    def load(self) -> tuple[JSON, dict[str, Tensor]] | None:
        def read() -> tuple[JSON, dict[str, Tensor]] | None:
            assert self._folder is not None
            return self._folder.load_record(self._name)

        return self._processes.broadcast(read)

    def save(self, record: JSON, tensors: Mapping[str, Tensor]) -> None:
        if self._folder is not None:
            self._folder.save_record(self._name, record, tensors)


def _summary(
    job: TuningJob,
    command: str,
    seconds: dict[str, float],
    measured: JSON | None,
    reports: list[JSON],
) -> Summary:
    written = Checkpoint.open(job.output, verify=False)
    extra = written.quantization.extra
    return Summary(
        model=job.teacher.name,
        hub_id=job.teacher.hub_id,
        recipe=", ".join(dict.fromkeys((_recipe_name(extra), job.recipe.name))),
        command=command,
        output=job.output,
        bytes_before=_weight_bytes(job.teacher.path),
        bytes_after=written.num_bytes,
        bits_per_weight=bits_per_weight(written),
        parameters=parameter_counts(written),
        seconds=seconds,
        peak_memory_bytes=memory.peak_resident(),
        evaluation=measured,
        not_quantized=extra.get("not_quantized", {}),
        tuning=reports,
    )


def _recipe_name(extra: JSON) -> str:
    recipe = extra.get("recipe")
    return str(recipe.get("name", "?")) if isinstance(recipe, dict) else "?"


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
