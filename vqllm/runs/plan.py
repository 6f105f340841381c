"""The plan of a run that the arguments of `vqllm.plan` mean."""

from pathlib import Path

from vqllm.core.progress import Progress
from vqllm.forecast.make import plan_of
from vqllm.forecast.plan import Plan
from vqllm.models import resolve as models
from vqllm.models.resolve import ResolvedModel
from vqllm.runs.arguments import PlanArguments
from vqllm.runs.commands import job_of, named_recipe, recipe_of, windows_of
from vqllm.runs.targets import Aim, checked_model


def plan(given: PlanArguments, progress: Progress) -> Plan:
    """What the run would give and take. VqllmError as of the run."""
    run = given.of_run(Path("."))
    recipe = recipe_of(run)
    model, is_there = _resolved(given)
    job, seen = job_of(run, recipe, model), None
    may_measure = given.measure and is_there
    if run.size is not None or run.kl is not None:
        aim = Aim(
            run,
            job,
            lambda name, changes: named_recipe(run, name, changes),
            progress,
            may_measure,
        )
        job, seen = job_of(run, aim.recipe(), model), aim.seen
    checked = checked_model(job)
    windows = windows_of(run, job.source) if given.evaluate and is_there else None
    return plan_of(
        job,
        checked,
        progress,
        windows=None if windows is None else (len(windows.tokens_SL), windows.tokens_SL.shape[1]),
        evaluate=given.evaluate,
        may_measure=may_measure,
        seen=seen,
    )


def _resolved(given: PlanArguments) -> tuple[ResolvedModel, bool]:
    """The model, and whether it has weights: a folder with config.json alone can be planned."""
    path = Path(given.model).expanduser()
    weights = [*path.glob("*.safetensors*"), *path.glob("*.bin")]
    if str(given.model) != "demo" and (path / "config.json").is_file() and not weights:
        return ResolvedModel(str(given.model), path), False
    found = models.resolve(
        given.model, trust_remote_code=given.trust_remote_code, allow_bin=given.allow_bin
    )
    return found, True
