"""From the arguments of `vqllm.quantize`, `tune` and `compare` to a job, and its run."""

import logging
from pathlib import Path

from vqllm import recipes
from vqllm.checkpoint.reader import Checkpoint
from vqllm.core.distributed import Processes
from vqllm.core.progress import NoProgress, Progress
from vqllm.errors import EvaluationError, ModelError, RecipeError
from vqllm.hf.classes import predicts_tokens
from vqllm.hf.loading import load_config
from vqllm.models import resolve as models
from vqllm.models.resolve import ResolvedModel
from vqllm.plan.job import Job
from vqllm.recipes import Recipe, TuningRecipe
from vqllm.report.summary import Summary
from vqllm.runs import quantize as quantization
from vqllm.runs import quantize_and_tune
from vqllm.runs import tune as tuning
from vqllm.runs.agreement import check_agreement
from vqllm.runs.arguments import CompareArguments, QuantizeArguments, TuneArguments
from vqllm.runs.compare.grid import Origin, expand
from vqllm.runs.compare.result import ComparisonResult
from vqllm.runs.compare.run import Plan
from vqllm.runs.compare.run import run as run_comparison
from vqllm.runs.devices import device_of, dtype_of
from vqllm.runs.measure import Windows, text_windows
from vqllm.runs.targets import Aim, run_to_kl
from vqllm.runs.teacher_check import teacher_of
from vqllm.runs.tuning_job import TuningJob

logger = logging.getLogger(__name__)

DEFAULT_BITS = 2


def quantize(given: QuantizeArguments, command: str | None, progress: Progress) -> Summary | None:
    """The run that the arguments mean; None in all but the first of several processes. `command`
    stands in place of their call in the pages."""
    command = command or given.call()
    processes = Processes.started(device_of(given.device))
    with processes.watched(), processes.quiet():
        recipe, model = processes.in_turn(lambda: _asked(given))

        def run(recipe: Recipe) -> Summary | None:
            return _run(given, recipe, model, command, progress, processes)

        if given.size is None and given.kl is None:
            return run(recipe)
        aim = Aim(
            given,
            job_of(given, recipe, model),
            lambda name, changes: named_recipe(given, name, changes),
            progress,
            processes=processes,
        )
        return run(aim.recipe()) if given.kl is None else run_to_kl(aim, run)


def _asked(given: QuantizeArguments) -> tuple[Recipe, ResolvedModel]:
    _check_windows(given.eval_text, given.eval_windows)
    recipe = recipe_of(given)
    model = models.resolve(
        given.model, trust_remote_code=given.trust_remote_code, allow_bin=given.allow_bin
    )
    return recipe, model


def _run(
    given: QuantizeArguments,
    recipe: Recipe,
    model: ResolvedModel,
    command: str,
    progress: Progress,
    processes: Processes,
) -> Summary | None:
    """The run of a recipe."""
    job = job_of(given, recipe, model)
    check_agreement(job, processes)
    evaluate = given.evaluate and _is_measurable(given, job.source)
    windows = None
    if evaluate:  # only the first process measures
        windows = processes.on_first(lambda: windows_of(given, job.source))
    shared = (windows, evaluate, command, progress if processes.is_first else NoProgress())
    if job.recipe.tune is not None:
        return quantize_and_tune.run(job, model, *shared, processes=processes)
    return quantization.run(job, *shared, hub_id=model.hub_id, processes=processes)


def _is_measurable(given: QuantizeArguments, source: Path) -> bool:
    """Whether the model predicts tokens, so that there is a divergence from the original's
    predictions; said once where it does not."""
    config = load_config(source, trust_remote_code=given.trust_remote_code)
    if predicts_tokens(config):
        return True
    logger.warning(
        "%s predicts no tokens (%s), so the result is not measured against the original",
        given.model,
        ", ".join(config.architectures),
    )
    return False


def tune(given: TuneArguments, command: str | None, progress: Progress) -> Summary | None:
    """The same of a tuning; None in all but the first of several processes."""
    command = command or given.call()
    _check_windows(given.eval_text, given.eval_windows)
    checkpoint = Checkpoint.open(given.checkpoint)
    job = TuningJob(
        recipe=_tuning_recipe(given),
        checkpoint=checkpoint,
        teacher=_teacher(checkpoint, given),
        output=Path(given.output),
        device=device_of(given.device),
        trust_remote_code=given.trust_remote_code,
    )
    windows = windows_of(given, job.teacher.path) if given.evaluate else None
    return tuning.run(job, windows, given.evaluate, command, progress)


def compare(given: CompareArguments, command: str | None, progress: Progress) -> ComparisonResult:
    """The same of a comparison."""
    _check_windows(given.eval_text, given.eval_windows)

    # Every member is a run of its own, with a recipe of its own.
    def member_of(origin: Origin, changes: tuple[str, ...], name: str = "") -> QuantizeArguments:
        return given.of_member(origin, changes, Path(given.output) / name)

    members, repeated = expand(
        given.recipe,
        given.grid or {},
        given.changes,
        lambda origin, changes: recipe_of(member_of(origin, changes)),
    )
    model = models.resolve(
        given.model, trust_remote_code=given.trust_remote_code, allow_bin=given.allow_bin
    )
    jobs, commands = {}, {}
    for member in members:
        own = member_of(member.origin, member.changes, member.name)
        jobs[member.name] = job_of(own, member.recipe, model)
        commands[member.name] = own.call()
    plan = Plan(
        model=model,
        output=Path(given.output),
        jobs=jobs,
        repeated=repeated,
        windows=windows_of(given, model.path),
        commands=commands,
        command=command or given.call(),
        keep_checkpoints=given.keep_checkpoints,
    )
    return run_comparison(plan, progress)


def recipe_of(given: QuantizeArguments) -> Recipe:
    """The recipe that the arguments mean.

    Raises:
        RecipeError: there is no such recipe, or arguments exclude each other.
    """
    recipe = given.recipe
    targets = {"bits": given.bits, "size": given.size, "kl": given.kl}
    named = [key for key, value in targets.items() if value is not None]
    if recipe is not None and (named or given.preset is not None):
        raise RecipeError(
            "give a recipe, or a number of bits (or a size, or a KL divergence) and a preset, not "
            "both."
        )
    if len(named) > 1:
        raise RecipeError(f"{' and '.join(named)} exclude each other: give one of them.")
    if given.preset == "fast" and named and named != ["bits"]:
        raise RecipeError(
            f"{named[0]} with the preset fast: it codes all linears alike, so that its rates are "
            f"few. Take {', '.join(p for p in recipes.PRESETS if p != 'fast')}."
        )
    if isinstance(recipe, Recipe):
        if given.changes:
            raise RecipeError("changes apply to recipes by name or file; change the object itself.")
        return _with_arguments(given, recipe)
    if recipe is not None:
        return named_recipe(given, recipe, ())
    bits = DEFAULT_BITS if given.bits is None else given.bits
    return named_recipe(given, *recipes.for_rate(bits, given.preset or "balanced"))


def named_recipe(given: QuantizeArguments, name: str | Path, changes: tuple[str, ...]) -> Recipe:
    """A recipe by name or file, with these changes, then those of the arguments."""
    return _with_arguments(given, recipes.load(name, (*changes, *given.changes)))


def _with_arguments(given: QuantizeArguments, chosen: Recipe) -> Recipe:
    # Arguments that stand in place of keys.
    values = chosen.to_dict()
    if given.calibration is not None:
        values["calibration"]["source"] = given.calibration
    if given.seed is not None:
        values["seed"] = given.seed
    resolved = recipes.from_dict(values, chosen.name)
    # What is recorded with the result says how many, whatever later versions take by default.
    values["calibration"]["sequences"] = resolved.calibration.num_sequences
    return recipes.from_dict(values, chosen.name)


def _tuning_recipe(given: TuneArguments) -> TuningRecipe:
    """The recipe that the arguments mean. Errors as of `recipe_of`."""
    if isinstance(given.recipe, TuningRecipe):
        chosen = given.recipe
        if given.changes:
            raise RecipeError("changes apply to recipes by name or file; change the object itself.")
    else:
        chosen = recipes.load_tuning(given.recipe, given.changes)
    # Arguments that stand in place of keys.
    values = chosen.to_dict()
    if given.calibration is not None:
        values["calibration"]["source"] = given.calibration
    if given.seed is not None:
        values["seed"] = given.seed
    if given.time is not None:
        timed = [stage for stage in values["stages"] if "time" in stage]
        for stage in timed:
            stage["time"] = given.time
        if not timed:
            raise RecipeError(f"{chosen.name} has no stage that ends by time: leave out --time")
    return recipes.tuning_from_dict(values, chosen.name)


def job_of(given: QuantizeArguments, recipe: Recipe, model: ResolvedModel) -> Job:
    """The run of a recipe that the arguments mean."""
    return Job(
        source=model.path,
        model=model.name,
        origin=model.origin,
        recipe=recipe,
        output=Path(given.output),
        device=device_of(given.device),
        compute_dtype=dtype_of(given.compute_dtype),
        trust_remote_code=given.trust_remote_code,
    )


def _teacher(checkpoint: Checkpoint, given: TuneArguments) -> ResolvedModel:
    """The original: as named, or as the checkpoint names it."""
    options = {"trust_remote_code": given.trust_remote_code, "allow_bin": given.allow_bin}
    if given.teacher is not None:
        return models.resolve(given.teacher, **options)
    name = teacher_of(checkpoint)
    try:
        return models.resolve(name, **options)
    except ModelError as error:
        raise ModelError(
            f"{checkpoint.folder} was made from {name!r}, which is not found from here: pass it "
            f"with --teacher. ({error})"
        ) from error


def _check_windows(text: str | Path | None, number: int | None) -> None:
    if text is None and number is not None:
        raise EvaluationError("a number of windows is of a text: pass --eval-text FILE as well.")


def windows_of(
    given: QuantizeArguments | TuneArguments | CompareArguments, source: Path
) -> Windows | None:
    """What is measured on, if it is a text. It is read before the long part: a text that cannot be
    measured on is a mistake that should be found at once."""
    if given.eval_text is None:
        return None
    return text_windows(source, given.eval_text, given.eval_windows, given.trust_remote_code)
