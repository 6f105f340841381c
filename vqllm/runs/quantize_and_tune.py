"""Runs of recipes with `tune`: linears are rounded into a folder inside the output folder, and the
result is tuned into the output folder.

    OUT/.vqllm/rounded   a whole run of the recipe without `tune`
    OUT                  a tuning run on that checkpoint
"""

from dataclasses import replace

from vqllm.calibration.data.calibration_set import check_length
from vqllm.checkpoint import atomic
from vqllm.checkpoint.reader import Checkpoint, is_checkpoint
from vqllm.checkpoint.resume.journal import ROUNDED, WORK, check_free, differences, is_unfinished
from vqllm.core.distributed import Processes
from vqllm.core.progress import Progress
from vqllm.errors import CheckpointError
from vqllm.hf.loading import load_config, runs_beyond
from vqllm.models.resolve import ResolvedModel
from vqllm.plan.job import Job
from vqllm.quantization.loop import check, open_run
from vqllm.report.summary import Summary
from vqllm.runs import quantize as quantization
from vqllm.runs import tune as tuning
from vqllm.runs.hooks import Hooks
from vqllm.runs.measure import Windows
from vqllm.runs.tuning_job import TuningJob, check_shard, open_tuned_run


def run(
    job: Job,
    teacher: ResolvedModel,
    windows: Windows | None,
    evaluate: bool,
    command: str,
    progress: Progress,
    *,
    hooks: Hooks | None = None,
    processes: Processes | None = None,
) -> Summary | None:
    """Quantize and tune, going on where an earlier run of the job stopped.

    Args:
        job: its recipe has `tune`.
        teacher: the model of the job.
        windows, evaluate, command: as in `tune.run`.
        hooks: `prepare` is called for both folders.
        processes: those that share the work; all must see the output folder.

    Returns:
        None in all but the first of several processes.

    Raises:
        CheckpointError: something else is in the folder, or a run of another recipe.
        RecipeError: its stages are for several processes, and one quantizes.
    """
    hooks, processes = hooks or Hooks(), processes or Processes()
    # Round, unless an earlier run finished that.
    seconds = {}
    if not processes.broadcast(lambda: _is_rounded(job, processes)):
        rounded = quantization.run(
            _rounding_job(job),
            None,
            False,
            command,
            progress,
            hub_id=teacher.hub_id,
            hooks=Hooks(prepare=hooks.prepare),
            processes=processes,
        )
        processes.wait()  # for the folder to be complete
        if rounded is not None:
            seconds = rounded.seconds
            del seconds["evaluation"]  # there was none

    def with_rounding(summary: Summary) -> Summary:
        return replace(summary, seconds={**seconds, **summary.seconds})

    # Tune what was rounded; what the caller is given has the seconds of both.
    summary = tuning.run(
        _tuning_job(job, teacher),
        windows,
        evaluate,
        command,
        progress,
        hooks=replace(hooks, finish=lambda summary: hooks.finish(with_rounding(summary))),
    )
    return None if summary is None else with_rounding(summary)


def check_output(job: Job, teacher: ResolvedModel) -> None:
    """Refuse, with its errors, a job that `run` could not begin or go on with."""
    rounding = _rounding_job(job)
    if _is_rounded(job, Processes()):
        if is_unfinished(job.output):
            open_tuned_run(_tuning_job(job, teacher), Processes()).__exit__(None, None, None)
    elif atomic.names_in(rounding.output):
        check(rounding)
        open_run(rounding).__exit__(None, None, None)


def _rounding_job(job: Job) -> Job:
    """The part of a job that comes first."""
    rounded = job.output / WORK / ROUNDED
    return replace(job, output=rounded, recipe=job.recipe.rounding_only(), is_part=True)


def _tuning_job(job: Job, teacher: ResolvedModel) -> TuningJob:
    """The part that follows, when the first one is finished."""
    return TuningJob(
        checkpoint=Checkpoint.open(_rounding_job(job).output),
        teacher=teacher,
        recipe=job.recipe.tuning_only(),
        output=job.output,
        device=job.device,
        trust_remote_code=job.trust_remote_code,
        within="tune.",
    )


def _is_rounded(job: Job, processes: Processes) -> bool:
    """Whether the first part is finished. Errors as of `run`."""
    # What the second part would refuse is found before the first one begins.
    assert job.recipe.tune is not None, "there is a part that follows"
    check_shard(job.recipe.tune, processes, "tune.")
    _check_length(job)
    check_free(job.output)
    # No finished checkpoint inside: a run in the folder itself must be one of this kind.
    rounding = _rounding_job(job)
    if is_unfinished(rounding.output) or not is_checkpoint(rounding.output):
        if is_unfinished(job.output):
            raise CheckpointError(
                f"{job.output} holds an unfinished run of a recipe without `tune`. Repeat the "
                "command that began it, or choose another output folder."
            )
        return False
    # A finished one must be of this recipe.
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
