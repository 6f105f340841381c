"""The runs of a comparison, one member after the other."""

import gc
import hashlib
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vqllm.checkpoint import atomic
from vqllm.checkpoint.format import RECORDS
from vqllm.checkpoint.resume.journal import differences, identity, is_unfinished
from vqllm.checkpoint.resume.run_folder import RunFolder
from vqllm.core import memory
from vqllm.core.progress import Progress
from vqllm.core.protocols import JSON
from vqllm.distillation.cached_predictions import RecordedPredictions
from vqllm.errors import CheckpointError, EvaluationError, ModelError, OutOfSpaceError, VqllmError
from vqllm.models.resolve import ResolvedModel
from vqllm.plan.job import Job
from vqllm.quantization.checks import check_model
from vqllm.quantization.loop import check, open_run
from vqllm.recipes import Recipe, TuningRecipe
from vqllm.report.comparison import comparison_pages
from vqllm.report.pages import PAGE, PLOT
from vqllm.report.summary import Summary
from vqllm.runs import quantize as quantization
from vqllm.runs import quantize_and_tune
from vqllm.runs.compare.grid import settings_of
from vqllm.runs.compare.result import ComparisonResult, result_of
from vqllm.runs.compare.store import Store
from vqllm.runs.hooks import Hooks, MakeSequences
from vqllm.runs.measure import Windows, held_out_windows, measure_against_original

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be compared, and how."""

    model: ResolvedModel
    output: Path
    jobs: Mapping[str, Job]
    """by the member's name, in the order in which they are run; they differ in recipe and output
    only, which is a folder in `output`"""
    repeated: Mapping[str, str]
    """names of further members, with the one whose settings they have"""
    windows: Windows | None
    """what members are measured on; None for the calibration sequences that all of them hold out"""
    commands: Mapping[str, str]
    """by member: what its page says it was made with"""
    command: str
    """what the page of the comparison says it was made with"""
    keep_checkpoints: bool


def run(plan: Plan, progress: Progress) -> ComparisonResult:
    """Run every member that is not finished, and rank them all.

    Every finished member is recorded, and stands in the pages of the folder, before the next one
    begins. A comparison that was killed at any moment goes on with the layer at which it was.

    Raises:
        VqllmError: found before the first member is run: a model that one of them would fail on,
            a folder that holds something else, members that cannot be measured on one text. Later
            only when the disk is full; any other error of a member is reported in the result.
    """
    # Before the first member takes hours, what another one would fail on.
    _check_members(plan)
    with Store(plan.output, _identity(plan)) as store:
        _check_folders(plan, store)
        failed: dict[str, str] = {}
        num_finished = sum(_is_finished(store, name, job) for name, job in plan.jobs.items())
        logger.info("%d members, %d of them finished", len(plan.jobs), num_finished)
        for number, (name, job) in enumerate(plan.jobs.items(), 1):
            # Any error of one member but a full disk leaves the others to run.
            if not _is_finished(store, name, job):
                progress.phase(f"{name}, {number} of {len(plan.jobs)}")
                try:
                    _run_member(plan, store, name, job, progress)
                except OutOfSpaceError:
                    raise
                except (VqllmError, MemoryError, torch.OutOfMemoryError) as error:
                    failed[name] = f"{type(error).__name__}: {error}"
                    logger.error("%s: %s", name, failed[name])
                gc.collect()  # models have cycles; the next member should not begin on top of them
                if number < len(plan.jobs):
                    _publish(plan, store, failed)
            if not plan.keep_checkpoints and _is_finished(store, name, job):
                _leave_report(job.output)
        return _publish(plan, store, failed)


def _run_member(plan: Plan, store: Store, name: str, job: Job, progress: Progress) -> None:
    """Quantize and measure a member, and record what came out before its folder is closed."""
    # A run that was stopped after its measurement only has its folder to close.
    earlier = store.result(name)
    own_peak = memory.restart_peak()
    whole = not atomic.names_in(job.output)

    # What members have in common is computed by the first of them that needs it.
    def prepare(folder: RunFolder, recipe: Recipe | TuningRecipe, make: MakeSequences) -> None:
        folder.load_or_make("sequences", lambda: store.sequences(_text_of(recipe), make))

    def measure(held_out_SL: Tensor) -> JSON:
        if earlier:
            return earlier["evaluation"]
        windows = plan.windows or held_out_windows(job.recipe, held_out_SL)
        return measure_against_original(
            job, windows, lambda original, SL: RecordedPredictions(original, SL, store.original)
        )

    def finish(summary: Summary) -> None:
        if not earlier:
            found = result_of(job.recipe.to_dict(), summary, whole=whole, own_peak=own_peak)
            store.save_result(name, found)

    hooks = Hooks(prepare=prepare, measure=measure, finish=finish)
    shared = (plan.windows, True, plan.commands[name], progress)
    if job.recipe.tune is None:
        summary = quantization.run(job, *shared, hub_id=plan.model.hub_id, hooks=hooks)
    else:
        summary = quantize_and_tune.run(job, plan.model, *shared, hooks=hooks)
    assert summary is not None, "one process compares"
    assert summary.evaluation is not None
    logger.info(
        "%s: KL divergence %.4f, %.1f MB",
        name,
        summary.evaluation["kl"],
        summary.bytes_after / 1e6,
    )


def _check_members(plan: Plan) -> None:
    """Refuse what some member would fail on, before any of them is run."""
    # What one of them holds out to be measured on, no other one may have seen.
    jobs = list(plan.jobs.values())
    texts = [_text_of(job.recipe) for job in jobs]
    texts += [_text_of(job.recipe.tuning_only()) for job in jobs if job.recipe.tune]
    if plan.windows is None and any(text != texts[0] for text in texts):
        raise EvaluationError(
            "the members are calibrated or tuned on different sequences, so what one of them holds "
            "out to measure on may be what another one has seen: pass a text for all, --eval-text "
            "FILE."
        )
    # All refusals at once, members of the same one together.
    refused: dict[str, list[str]] = {}
    for name, job in plan.jobs.items():
        try:
            check_model(job.source, job.model, job.recipe, job.trust_remote_code)
        except VqllmError as error:
            refused.setdefault(str(error), []).append(name)
    if refused:
        lines = [f"{', '.join(names)}: {message}" for message, names in refused.items()]
        num = sum(map(len, refused.values()))
        raise ModelError(
            f"{num} of {len(jobs)} members cannot be run on {plan.model.name}:\n" + "\n".join(lines)
        )


def _check_folders(plan: Plan, store: Store) -> None:
    """Refuse folders and results of other recipes than the members'."""
    for name, job in plan.jobs.items():
        earlier = store.result(name)
        if earlier is not None:
            lines = differences(settings_of(earlier["recipe"]), settings_of(job.recipe.to_dict()))
            if lines:
                raise CheckpointError(
                    f"{plan.output} has a result of {name} with another recipe (there → here):\n"
                    + "\n".join(lines)
                    + "\nGive the recipe another name, or choose another output folder."
                )
        elif job.recipe.tune is not None:
            quantize_and_tune.check_output(job, plan.model)
        elif atomic.names_in(job.output):
            check(job)
            open_run(job).__exit__(None, None, None)


def _identity(plan: Plan) -> JSON:
    """What must be the same for all members, whenever they are run."""
    job = next(iter(plan.jobs.values()))
    if plan.windows is None:
        measured_on: JSON = {"held_out_of": _text_of(job.recipe)}
    else:
        tokens = plan.windows.tokens_SL.numpy().tobytes()
        measured_on = {
            "text": plan.windows.label,
            "tokens": hashlib.sha256(tokens).hexdigest()[:16],
        }
    settings = {
        "device": job.device.type,
        "compute_dtype": str(job.compute_dtype or "auto"),
        "evaluation": measured_on,
    }
    return identity(
        model=plan.model.name,
        source=plan.model.path,
        recipe={},
        settings=settings,
        trust_remote_code=job.trust_remote_code,
    )


def _text_of(recipe: Recipe | TuningRecipe) -> JSON:
    """What the sequences that a recipe calibrates or tunes on depend on."""
    values = recipe.to_dict()
    return {key: values[key] for key in ("calibration", "seed")}


def _is_finished(store: Store, name: str, job: Job) -> bool:
    return store.result(name) is not None and not is_unfinished(job.output)


def _leave_report(folder: Path) -> None:
    """Delete a checkpoint, and keep the pages that say what it was."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (PAGE, PLOT, RECORDS):
            path.unlink()


def _publish(plan: Plan, store: Store, failed: Mapping[str, str]) -> ComparisonResult:
    """Rank the members as they stand, and write the pages."""
    results = {
        name: store.result(name)
        for name, job in plan.jobs.items()
        if _is_finished(store, name, job)
    }
    result = ComparisonResult.of(
        plan.model.name,
        {name: found for name, found in results.items() if found is not None},
        failed=dict(failed),
        repeated=dict(plan.repeated),
        waiting=[name for name in plan.jobs if name not in results and name not in failed],
    )
    store.publish(comparison_pages(result.to_dict(), plan.command))
    return result
