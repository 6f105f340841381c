"""Tuning a quantized checkpoint against the model that it was made from."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqllm.calibration.data.calibration_set import SELF, check_length
from vqllm.calibration.data.text_sources import open_source
from vqllm.calibration.layer_stream import Layers, LayerStream
from vqllm.checkpoint import atomic
from vqllm.checkpoint.inspect import bits_per_weight
from vqllm.checkpoint.reader import Checkpoint, is_checkpoint
from vqllm.checkpoint.resume.journal import (
    ROUNDED,
    WORK,
    check_free,
    differences,
    fingerprint,
    is_unfinished,
)
from vqllm.checkpoint.resume.tuned_writer import TunedRun
from vqllm.core import memory
from vqllm.core.distributed import Processes
from vqllm.core.progress import Progress
from vqllm.core.protocols import JSON
from vqllm.distillation.cached_predictions import StreamedPredictions, windows_name
from vqllm.distillation.student import Student
from vqllm.errors import CheckpointError, ModelError, RecipeError
from vqllm.evaluation import perplexity as evaluation
from vqllm.hf.loading import load_config, load_tokenizer, runs_beyond, skeleton
from vqllm.models.load import load_to_run
from vqllm.models.resolve import ResolvedModel
from vqllm.plan.job import Job
from vqllm.quantization.loop import open_run, sequences_of
from vqllm.recipes import Stages, TuningRecipe
from vqllm.report.pages import report_pages
from vqllm.report.summary import Summary
from vqllm.runs import quantize as quantization
from vqllm.runs.quantize import Measure, Prepare, Windows
from vqllm.tuning.base import ModelTask

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TuningJob:
    """What to tune, how, against what."""

    checkpoint: Checkpoint
    teacher: ResolvedModel
    recipe: TuningRecipe
    output: Path
    device: torch.device
    trust_remote_code: bool = False
    within: str = ""
    """what stands before the recipe's keys in that of the command"""


def teacher_of(checkpoint: Checkpoint) -> str:
    """The original model as the checkpoint names it.

    Raises:
        CheckpointError: it does not say.
    """
    source = checkpoint.quantization.extra.get("source")
    if not isinstance(source, dict) or not isinstance(source.get("model"), str):
        raise CheckpointError(
            f"{checkpoint.folder} does not say which model it was made from: pass it with "
            "--teacher."
        )
    return source["model"]


def run(
    job: TuningJob,
    windows: Windows | None,
    evaluate: bool,
    command: str,
    progress: Progress,
    *,
    measure: Callable[[Tensor], JSON] | None = None,
    prepare: Prepare = lambda *_: None,
    keep: Callable[[Summary], None] = lambda _: None,
) -> Summary | None:
    """Tune, measure and write the pages, going on where an earlier run of the job stopped.

    Args:
        windows: what the result is measured on; None takes the held-out sequences.
        evaluate: False leaves it unmeasured.
        command: what the pages say the checkpoint was made with.
        measure: measures the result in place of that; is given the held-out sequences.
        prepare: is called by the first process before anything is computed.
        keep: is given the summary before the folder is closed; until it returns, the run is
            unfinished.

    Returns:
        None in all but the first of several processes that share the work.

    Raises:
        VqllmError: a mistake that the message explains; the last kept state stays.
    """
    for name in job.recipe.calibration.source:
        if name != SELF:
            open_source(name)  # what cannot be read is found before a folder is begun
    processes = Processes.started(job.device)
    _check_shard(job.recipe, processes, job.within)
    if job.recipe.shard:
        # Weights come and go with every call: 335 MB of matrices of 8 MB, split over two processes,
        # left holes of 1.3 GB in two steps, and none with this.
        memory.keep_large_blocks_apart()
    with ExitStack() as stack, _explained_memory(job):
        _check_fit(job)
        folder = processes.on_first(lambda: stack.enter_context(_open_run(job, processes)))
        if folder is not None:
            prepare(folder, job.recipe, lambda: _sequences_of(job))
        tuning = _Tuning(job, folder, processes, progress)
        return tuning.run(windows, evaluate, command, measure, keep)


def _check_shard(recipe: Stages, processes: Processes, within: str) -> None:
    if recipe.shard and processes.size == 1:
        raise RecipeError(
            f"{within}shard splits a model over several processes, and there is one: start them "
            "with torchrun --nproc-per-node NUMBER -m vqllm tune, or leave the key out."
        )


def _open_run(job: TuningJob, processes: Processes) -> TunedRun:
    if job.output.resolve() == job.checkpoint.folder.resolve():
        raise CheckpointError(
            f"{job.output} is the checkpoint that is to be tuned, which is not changed: choose "
            "another output folder."
        )
    settings = {
        "teacher": job.teacher.name,
        "teacher_files": fingerprint(job.teacher.path),
        "device": job.device.type,
        "processes": processes.size,
    }
    return TunedRun(job.output, job.checkpoint, _identity(job.recipe), settings)


def quantize_and_tune(
    job: Job,
    teacher: ResolvedModel,
    windows: Windows | None,
    evaluate: bool,
    command: str,
    progress: Progress,
    *,
    measure: Measure | None = None,
    prepare: Prepare = lambda *_: None,
    keep: Callable[[Summary], None] = lambda _: None,
) -> Summary:
    """Quantize into a folder inside the output folder, and tune the result into the output folder.

    Args:
        job: its recipe has `tune`.
        teacher: the model of the job.
        measure, prepare, keep: as in `run`; `prepare` is called for both folders.

    Raises:
        CheckpointError: something else is in the folder, or a run of another recipe.
        RecipeError: its stages are for several processes, and one quantizes.
    """
    seconds = {}
    if not _is_rounded(job):
        seconds = quantization.run(
            _rounding(job),
            None,
            hub_id=teacher.hub_id,
            command=command,
            progress=progress,
            prepare=prepare,
        ).seconds
        del seconds["evaluation"]  # there was none

    def with_rounding(summary: Summary) -> Summary:
        return replace(summary, seconds={**seconds, **summary.seconds})

    summary = run(
        _tuning(job, teacher),
        windows,
        evaluate,
        command,
        progress,
        measure=None if measure is None else partial(measure, job),
        prepare=prepare,
        keep=lambda summary: keep(with_rounding(summary)),
    )
    assert summary is not None, "one process quantizes"
    return with_rounding(summary)


def check_output(job: Job, teacher: ResolvedModel) -> None:
    """Refuse, with its errors, a job that `quantize_and_tune` could not begin or go on with."""
    rounding = _rounding(job)
    if _is_rounded(job):
        if is_unfinished(job.output):
            _open_run(_tuning(job, teacher), Processes()).__exit__(None, None, None)
    elif atomic.names_in(rounding.output):
        open_run(rounding).__exit__(None, None, None)


def _rounding(job: Job) -> Job:
    """The part of a job that comes first."""
    return replace(job, output=job.output / WORK / ROUNDED, recipe=job.recipe.rounding_only())


def _tuning(job: Job, teacher: ResolvedModel) -> TuningJob:
    """The part that follows, when the first one is finished."""
    return TuningJob(
        checkpoint=Checkpoint.open(_rounding(job).output),
        teacher=teacher,
        recipe=job.recipe.tuning_only(),
        output=job.output,
        device=job.device,
        trust_remote_code=job.trust_remote_code,
        within="tune.",
    )


def _is_rounded(job: Job) -> bool:
    """Whether that part is finished. Errors as of `quantize_and_tune`."""
    assert job.recipe.tune is not None, "there is a part that follows"
    _check_shard(job.recipe.tune, Processes(), "tune.")
    _check_length(job)
    check_free(job.output)
    rounding = _rounding(job)
    if is_unfinished(rounding.output) or not is_checkpoint(rounding.output):
        if is_unfinished(job.output):
            raise CheckpointError(
                f"{job.output} holds an unfinished run of a recipe without `tune`. Repeat the "
                "command that began it, or choose another output folder."
            )
        return False
    checkpoint = Checkpoint.open(rounding.output, verify=False)
    lines = differences(checkpoint.quantization.extra["recipe"], rounding.recipe.to_dict())
    if lines:
        raise CheckpointError(
            f"{job.output} holds an unfinished run that differs (there → here):\n"
            + "\n".join(lines)
            + "\nTo go on with it, repeat the command that began it. To start over, delete the "
            "folder or choose another one."
        )
    return True


def _check_length(job: Job) -> None:
    """Refuse, before the linears are rounded, sequences that the model cannot be tuned on."""
    assert job.recipe.tune is not None, "there is a part that follows"
    config = load_config(job.source, trust_remote_code=job.trust_remote_code)
    if not runs_beyond(config):  # otherwise there is a warning when they are read
        check_length(config, job.recipe.tune.calibration.length, "tune.calibration.length")


class _Tuning:
    """A run in its folder, which only the first process has."""

    def __init__(
        self, job: TuningJob, folder: TunedRun | None, processes: Processes, progress: Progress
    ) -> None:
        self._job, self._folder = job, folder
        self._processes, self._progress = processes, progress
        self._scratch = job.output / WORK
        """of the folder, in all processes"""

    def run(
        self,
        windows: Windows | None,
        evaluate: bool,
        command: str,
        measure: Callable[[Tensor], JSON] | None,
        keep: Callable[[Summary], None],
    ) -> Summary | None:
        job, start = self._job, time.perf_counter()
        self._phase("calibration text")
        # Before the models are loaded: a source that is the model itself is one more in memory.
        sequences = self._processes.broadcast(self._sequences)
        student = self._student(self._load(job.checkpoint.folder)[0])
        follows = not all(stage.by_layers for stage in job.recipe.stages)
        asked = [sequences["calibration"]] if follows else []
        teacher = None
        if follows or (evaluate and measure is None and windows is None):
            teacher = self._teacher(torch.cat([*asked, sequences["held_out"]]))
        told = self._tune(student, teacher, sequences)
        del student  # what was written is measured
        self._processes.leave()
        if self._folder is None:
            return None
        seconds = {"tuning": time.perf_counter() - start}
        measured = None
        if evaluate:
            self._phase("evaluation against the original")
            start = time.perf_counter()
            if measure is None:
                measured = self._measured(teacher, windows, sequences["held_out"])
            else:
                del teacher  # a live one would be the original's second copy in memory
                measured = measure(sequences["held_out"])
            seconds["evaluation"] = time.perf_counter() - start
        summary = _summary(job, command, seconds, measured, told)
        keep(summary)
        records = list(Checkpoint.open(job.output, verify=False).records().values())
        self._folder.complete(report_pages(records, summary, job.recipe.to_yaml()))
        return summary

    def _measured(self, teacher: Any, windows: Windows | None, held_out_SL: Tensor) -> JSON:
        """The written checkpoint against the original."""
        job = self._job
        if windows is not None and (job.recipe.teacher == "cached" or teacher is None):
            self._processes = Processes()  # the others are gone
            teacher = self._teacher(windows.tokens_SL, windows_name(windows.tokens_SL))
        tuned, _ = self._load(job.output)
        chosen = windows or quantization.held_out(job.recipe, held_out_SL)
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

    def _open_original(self, offload: Path) -> LayerStream:
        job = self._job
        return LayerStream(
            job.teacher.path, job.device, offload, torch.bfloat16, job.trust_remote_code
        )

    def _open_again(self) -> LayerStream:
        """The original once more, a layer at a time."""
        offload = self._scratch / f"offload-layers-{self._processes.rank}"
        return self._open_original(offload)

    def _tune(self, student: Student, teacher: Any, sequences: Mapping[str, Tensor]) -> list[JSON]:
        """Write the tuned checkpoint; what the stages say."""
        told = self._stages(student, teacher, sequences)
        self._phase("writing the tuned model")
        self._processes.on_first(lambda: self._write(student))
        return told

    def _phase(self, text: str) -> None:
        if self._processes.is_first:
            self._progress.phase(text)

    def _share(self, done: float) -> None:
        if self._processes.is_first:
            self._progress.share(done)

    def _sequences(self) -> dict[str, Tensor]:
        assert self._folder is not None
        return self._folder.load_or_make("sequences", lambda: _sequences_of(self._job))

    def _student(self, model: Any) -> Student:
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

    def _stages(
        self, student: Student, teacher: Any, sequences: Mapping[str, Tensor]
    ) -> list[JSON]:
        told = []
        for number, stage in enumerate(self._job.recipe.stages):
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
                student_layers=lambda names: Layers(student.model, names, self._job.device),
                teacher_layers=self._open_again,
            )
            told.append({"stage": stage.type, **stage(task)})
        return told

    def _write(self, student: Student) -> None:
        assert self._folder is not None
        changes = student.changes()
        record = {"recipe": self._job.recipe.to_dict(), "teacher": self._job.teacher.origin}
        self._folder.write(changes.specs, changes.packed, changes.others, record)


def _sequences_of(job: TuningJob) -> dict[str, Tensor]:
    return sequences_of(job.teacher.path, job.recipe, job.device, job.trust_remote_code)


def _summary(
    job: TuningJob,
    command: str,
    seconds: dict[str, float],
    measured: JSON | None,
    told: list[JSON],
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
        seconds=seconds,
        peak_memory_bytes=memory.peak_resident(),
        evaluation=measured,
        not_quantized=extra.get("not_quantized", {}),
        tuning=told,
    )


def _identity(recipe: TuningRecipe) -> JSON:
    """The recipe, as far as a run that goes on must have the same: how many sequences run together,
    what is computed again and whether the original stays in memory change the order of sums at
    most, and are what to change where memory ended."""
    values = recipe.to_dict()
    del values["teacher"], values["shard"]
    for stage in values["stages"]:
        stage.pop("together", None)
        stage.pop("checkpointing", None)
    return values


def _check_fit(job: TuningJob) -> None:
    """Look at the sizes and vocabularies of both models before anything is computed."""
    own, teacher, trust = job.checkpoint.folder, job.teacher.path, job.trust_remote_code
    if is_checkpoint(teacher):
        raise ModelError(
            f"the teacher {teacher} is a quantized checkpoint itself. Pass the original model that "
            f"{own} was made from."
        )
    check_teacher(
        own,
        skeleton(own, trust_remote_code=trust),
        skeleton(teacher, trust_remote_code=trust),
        load_tokenizer(own, trust_remote_code=trust),
        load_tokenizer(teacher, trust_remote_code=trust),
    )


class _FolderStates:
    """The state of one stage in the folder of a run."""

    def __init__(self, folder: TunedRun | None, processes: Processes, name: str) -> None:
        self._folder, self._processes, self._name = folder, processes, name

    def load(self) -> tuple[JSON, dict[str, Tensor]] | None:
        def read() -> tuple[JSON, dict[str, Tensor]] | None:
            assert self._folder is not None
            return self._folder.load_record(self._name)

        return self._processes.broadcast(read)

    def save(self, record: JSON, tensors: Mapping[str, Tensor]) -> None:
        if self._folder is not None:
            self._folder.save_record(self._name, record, tensors)


def check_teacher(
    folder: Path, own: nn.Module, teacher: nn.Module, own_tokenizer: Any, tokenizer: Any
) -> None:
    """Refuse a teacher that the checkpoint cannot have been made from.

    Args:
        folder: of the checkpoint.
        own: the model that it configures, as `skeleton` gives it.

    Raises:
        ModelError: a tensor has another size there or is missing in one of them, or tokens differ.
    """
    ours, theirs = _shapes(own), _shapes(teacher)
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            here, there = (shapes.get(name, "no such tensor") for shapes in (ours, theirs))
            raise ModelError(
                f"the teacher does not fit: of {name} {folder} has {here}, and the teacher has "
                f"{there}. Pass the model that it was made from."
            )
    if tokenizer.get_vocab() != own_tokenizer.get_vocab():
        raise ModelError(
            f"the teacher does not fit: it has another vocabulary than {folder}. Pass the model "
            "that it was made from."
        )


def _shapes(model: nn.Module) -> dict[str, str]:
    """Of the parameters by name, tied ones too: "64 x 172"."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: " x ".join(map(str, tensor.shape)) for name, tensor in parameters}


class _explained_memory:
    """Turns running out of memory into a message that says what to lower."""

    def __init__(self, job: TuningJob) -> None:
        self._keys, self._stages = job.within, job.recipe.stages
        live = job.recipe.teacher == "live"
        self._cached = f", or with --set {job.within}teacher=cached" if live else ""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        out = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if out or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
            ways = f"fewer sequences at a time, {self._set('together', 1)}"
            if again := self._set("checkpointing", "true"):
                ways += f", or with activations computed again, {again}"
            raise ModelError(
                f"out of memory. What was tuned is kept: repeat the command with {ways}"
                f"{self._cached}. If that is not enough, lower {self._keys}calibration.length "
                "(which begins the tuning again, in another folder), or take another --device."
            ) from error

    def _set(self, key: str, value: object) -> str:
        """The options that set a key in all stages that have it."""
        numbers = [i for i, stage in enumerate(self._stages) if key in type(stage).model_fields]
        return " ".join(f"--set {self._keys}stages.{i}.{key}={value}" for i in numbers)


def _recipe_name(extra: JSON) -> str:
    recipe = extra.get("recipe")
    return str(recipe.get("name", "?")) if isinstance(recipe, dict) else "?"


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
