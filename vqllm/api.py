"""The Python interface: what the commands do, as functions."""

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vqllm import recipes
from vqllm.calibration.data.text_sources import is_unicode
from vqllm.checkpoint.reader import Checkpoint
from vqllm.core.progress import LogProgress, Progress
from vqllm.core.protocols import JSON
from vqllm.errors import EvaluationError, ModelError, RecipeError
from vqllm.evaluation import perplexity as evaluation
from vqllm.evaluation import speed
from vqllm.models import resolve as models
from vqllm.models.load import load as load
from vqllm.models.load import load_to_run
from vqllm.models.resolve import ResolvedModel
from vqllm.plan.job import Job
from vqllm.recipes import Recipe, TuningRecipe
from vqllm.report.summary import Summary
from vqllm.runs import quantize as quantization
from vqllm.runs import tune as teaching
from vqllm.runs.compare.grid import Origin, expand
from vqllm.runs.compare.result import ComparisonResult
from vqllm.runs.compare.run import Plan
from vqllm.runs.compare.run import run as run_comparison
from vqllm.runs.quantize import measure_on, text_label, windows_of

DEFAULT_BITS = 2


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | Recipe | None = None,
    bits: float | None = None,
    preset: str | None = None,
    calibration: str | Path | Iterable[str | Path] | None = None,
    seed: int | None = None,
    changes: tuple[str, ...] = (),
    device: str | None = None,
    compute_dtype: str | None = None,
    evaluate: bool = True,
    eval_text: str | Path | None = None,
    eval_windows: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> Summary:
    """Quantize a model into a folder that transformers loads; the same as `vqllm quantize`.

    Args:
        model: "demo", a hub id, a folder or a `.gguf` file.
        output: the folder to write; an unfinished run of the same command goes on.
        recipe: a shipped recipe's name, a YAML file or a Recipe; with `bits` instead, the best
            recipe for that number of bits (2 when neither is given).
        preset: with `bits`: "fast", "balanced" (the default) or "best", by the time of a run, or
            "tuned": the best quality, for which the whole model has to fit in memory with its
            gradients.
        calibration: sources in place of the recipe's: "self", files, folders, datasets ids.
        seed: in place of the recipe's.
        changes: `dotted.key=value` changes of the recipe.
        device: "cpu", "cuda", ...; None takes a GPU if there is one.
        compute_dtype: dtype in which layers run; None chooses by source dtype and device.
        evaluate: measure the result against the original.
        eval_text: a text file to measure on; None takes held-out sequences of the calibration
            sources.
        eval_windows: use the first windows of 2048 tokens of the text only.
        trust_remote_code: whether Python code in the model's folder may run.
        progress: receives events; None logs a line per layer.
        command: what the report says the checkpoint was made with.

    Raises:
        VqllmError: a mistake that the message explains; finished layers are kept.
    """
    calibration = _names(calibration)
    command = command or _call(quantize, locals())
    _check_windows(eval_text, eval_windows)
    chosen = _recipe(recipe, bits, preset, calibration, seed, changes)
    resolved = models.resolve(model, trust_remote_code=trust_remote_code)
    job = _job(resolved, chosen, output, device, compute_dtype, trust_remote_code)
    windows = None
    if evaluate and eval_text is not None:
        # Before the long part: a text that cannot be measured on is a mistake found at once.
        windows = windows_of(job.source, eval_text, eval_windows, trust_remote_code)
    progress = progress or LogProgress()
    if chosen.tune is not None:
        return teaching.quantize_and_tune(job, resolved, windows, evaluate, command, progress)
    measure = measure_on(windows) if evaluate else None
    return quantization.run(
        job,
        measure,
        hub_id=resolved.hub_id,
        command=command,
        progress=progress,
    )


def tune(
    checkpoint: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | TuningRecipe = "end-to-end",
    teacher: str | Path | None = None,
    calibration: str | Path | Iterable[str | Path] | None = None,
    seed: int | None = None,
    time: str | None = None,
    changes: tuple[str, ...] = (),
    device: str | None = None,
    evaluate: bool = True,
    eval_text: str | Path | None = None,
    eval_windows: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> Summary | None:
    """Tune a quantized model against its original; the same as `vqllm tune`.

    Args:
        checkpoint: a folder that `quantize` or `tune` wrote; it is not changed.
        output: the folder to write; an unfinished run of the same command goes on.
        recipe: a shipped tuning recipe's name, a YAML file or a TuningRecipe.
        teacher: the original model; None takes the one that the checkpoint names.
        time: stop each stage after so long ("20m"), at the best state so far.
        calibration: as in `quantize`; so are seed, changes, device, evaluate, eval_text,
            eval_windows, trust_remote_code, progress and command.

    Returns:
        None in all but the first of several processes (`torchrun`), which share the sequences of
        every step.

    Raises:
        VqllmError: a mistake that the message explains; the last kept state stays.
    """
    calibration = _names(calibration)
    command = command or _call(tune, locals())
    _check_windows(eval_text, eval_windows)
    opened = Checkpoint.open(checkpoint)
    chosen = _tuning_recipe(recipe, calibration, seed, time, changes)
    job = teaching.TuningJob(
        checkpoint=opened,
        teacher=_teacher(opened, teacher, trust_remote_code),
        recipe=chosen,
        output=Path(output),
        device=_device(device),
        trust_remote_code=trust_remote_code,
    )
    windows = None
    if evaluate and eval_text is not None:
        windows = windows_of(job.teacher.path, eval_text, eval_windows, trust_remote_code)
    return teaching.run(job, windows, evaluate, command, progress or LogProgress())


def _teacher(
    checkpoint: Checkpoint, given: str | Path | None, trust_remote_code: bool
) -> ResolvedModel:
    if given is not None:
        return models.resolve(given, trust_remote_code=trust_remote_code)
    named = teaching.teacher_of(checkpoint)
    try:
        return models.resolve(named, trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise ModelError(
            f"{checkpoint.folder} was made from {named!r}, which is not found from here: pass it "
            f"with --teacher. ({error})"
        ) from error


def _tuning_recipe(
    recipe: str | Path | TuningRecipe,
    calibration: list[str] | None,
    seed: int | None,
    time: str | None,
    changes: tuple[str, ...],
) -> TuningRecipe:
    """The recipe that the arguments of `tune` mean."""
    if isinstance(recipe, TuningRecipe) and changes:
        raise RecipeError("changes apply to recipes by name or file; change the object itself.")
    chosen = recipe if isinstance(recipe, TuningRecipe) else recipes.load_tuning(recipe, changes)
    values = chosen.to_dict()
    if calibration is not None:
        values["calibration"]["source"] = calibration
    if seed is not None:
        values["seed"] = seed
    if time is not None:
        timed = [stage for stage in values["stages"] if "time" in stage]
        for stage in timed:
            stage["time"] = time
        if not timed:
            raise RecipeError(f"{chosen.name} has no stage that ends by time: leave out --time")
    return recipes.tuning_from_dict(values, chosen.name)


def compare(
    model: str | Path,
    output: str | Path,
    recipe: str | Path | Recipe | Iterable[str | Path | Recipe],
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    changes: tuple[str, ...] = (),
    calibration: str | Path | Iterable[str | Path] | None = None,
    seed: int | None = None,
    device: str | None = None,
    compute_dtype: str | None = None,
    eval_text: str | Path | None = None,
    eval_windows: int | None = None,
    keep_checkpoints: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> ComparisonResult:
    """Quantize a model with several recipes, and rank them; the same as `vqllm compare`.

    Each member is a run of `quantize` in a folder of its own. The original's predictions on the
    text, and calibration sequences that members share, are computed once.

    Args:
        model: as in `quantize`; so are calibration, seed, changes, device, compute_dtype,
            eval_windows, trust_remote_code, progress and command.
        output: a folder for the members and the pages about them; a comparison that was stopped
            goes on, and recipes may be added to it.
        recipe: shipped names, patterns over them (`trellis-*`), YAML files and Recipes.
        grid: values by dotted key of the recipe: every recipe is run with every combination.
        eval_text: a text file to measure on; None takes the held-out sequences of the calibration
            sources, which must then be the same for all.
        keep_checkpoints: False deletes a member's weights once it is measured, and keeps its
            report.

    Returns:
        The finished members, ranked, and the errors of those that failed.

    Raises:
        VqllmError: a mistake that is found before the first member is run, or a full disk.
    """
    several = not isinstance(recipe, str | Path | Recipe)
    recipe = list(recipe) if several else [recipe]
    calibration = _names(calibration)
    given = dict(locals())

    def build(origin: Origin, changed: tuple[str, ...]) -> Recipe:
        return _recipe(origin, None, None, calibration, seed, changed)

    _check_windows(eval_text, eval_windows)
    members, repeated = expand(recipe, grid or {}, changes, build)
    resolved = models.resolve(model, trust_remote_code=trust_remote_code)
    jobs, commands = {}, {}
    for member in members:
        folder = Path(output) / member.name
        options = (device, compute_dtype, trust_remote_code)
        jobs[member.name] = _job(resolved, member.recipe, folder, *options)
        own = {"recipe": member.origin, "changes": member.changes, "output": folder}
        commands[member.name] = _call(quantize, given | own)
    windows = None
    if eval_text is not None:
        windows = windows_of(resolved.path, eval_text, eval_windows, trust_remote_code)
    plan = Plan(
        model=resolved,
        output=Path(output),
        jobs=jobs,
        repeated=repeated,
        windows=windows,
        commands=commands,
        command=command or _call(compare, given),
        keep_checkpoints=keep_checkpoints,
    )
    return run_comparison(plan, progress or LogProgress())


def _check_windows(text: str | Path | None, number: int | None) -> None:
    if text is None and number is not None:
        raise EvaluationError("a number of windows is of a text: pass --eval-text FILE as well.")


def _call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """The call of a function with these arguments as Python text; what has its default is left
    out."""
    shown = []
    for name, parameter in inspect.signature(function).parameters.items():
        value = arguments.get(name, parameter.default)
        if parameter.default is inspect.Parameter.empty:
            shown.append(_text_of(value))
        elif name not in ("progress", "command") and value != parameter.default:
            shown.append(f"{name}={_text_of(value)}")
    return f"vqllm.{function.__name__}({', '.join(shown)})"


def _text_of(value: Any) -> str:
    """An argument as Python text."""
    if isinstance(value, Recipe):
        return f"vqllm.recipe.from_dict({value.to_dict()!r}, {value.name!r})"
    if isinstance(value, list):
        return f"[{', '.join(map(_text_of, value))}]"
    return repr(str(value) if isinstance(value, Path) else value)


def _names(sources: str | Path | Iterable[str | Path] | None) -> list[str] | None:
    """Calibration sources as the recipe has them."""
    if sources is None:
        return None
    one = isinstance(sources, str | Path)
    return [str(source) for source in ([sources] if one else sources)]


def _job(
    model: ResolvedModel,
    recipe: Recipe,
    output: str | Path,
    device: str | None,
    compute_dtype: str | None,
    trust_remote_code: bool,
) -> Job:
    return Job(
        source=model.path,
        model=model.name,
        origin=model.origin,
        recipe=recipe,
        output=Path(output),
        device=_device(device),
        compute_dtype=_dtype(compute_dtype),
        trust_remote_code=trust_remote_code,
    )


def evaluate(
    model: str | Path,
    *,
    baseline: str | Path | None = None,
    tasks: Sequence[str] = (),
    text: str | Path | None = None,
    num_windows: int | None = None,
    window_length: int = 2048,
    data: str | Path | None = None,
    limit: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> JSON:
    """Measure a model; the same as `vqllm eval`.

    Args:
        model: a quantized folder, or anything that names a model.
        baseline: a model to compare with: KL divergence and top-1 agreement on `text`.
        tasks: lm-eval task names, or ours (`vqllm_piqa`, ...).
        text: a text file or datasets id for perplexity.
        num_windows: use the first windows of the text only.
        window_length: tokens of a window.
        data: folder of local task files, in place of `$VQLLM_DATA`.
        limit: items of each task.

    Returns:
        JSON values: "text" with perplexities, "tasks" with lm-eval's metrics.

    Raises:
        EvaluationError: nothing to do, an unknown task, a text that is too short, windows longer
            than the model takes, or a baseline with another tokenizer.
    """
    if text is None and not tasks:
        raise EvaluationError("nothing to measure: pass --text FILE, --tasks NAME, or both.")
    if baseline is not None and text is None:
        raise EvaluationError("a baseline is compared on a text: pass --text FILE as well.")
    evaluation.check_windows(num_windows, window_length)
    manager = None
    if tasks:
        # Its import takes a second, and the mistakes it finds should not wait for the model.
        from vqllm.integrations import lm_eval

        manager = lm_eval.task_manager(tasks, data=data, limit=limit)
    target, tokenizer = load_to_run(model, _device(device), trust_remote_code)
    results: JSON = {"model": str(model)}
    if text is not None:
        tokens = evaluation.text_windows(text, tokenizer, num_windows, window_length)
        label = text_label(text, tokens)
        if baseline is None:
            results["text"] = evaluation.perplexity(target, tokens, label).to_dict()
        else:
            original, other = load_to_run(baseline, _device(device), trust_remote_code)
            evaluation.check_same_tokens(
                tokens, evaluation.text_windows(text, other, num_windows, window_length)
            )
            results["text"] = evaluation.compare(target, original, tokens, label).to_dict()
            del original
    if manager is not None:
        from vqllm.integrations import lm_eval

        results["tasks"] = lm_eval.run_tasks(target, tokenizer, tasks, limit=limit, manager=manager)
    return results


def bench(
    model: str | Path,
    *,
    baseline: str | Path | None = None,
    batch: int = 1,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    rounds: int = 3,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> JSON:
    """Time a model, beside its original or alone; the same as `vqllm bench`.

    Args:
        model: a quantized folder, or anything that names a model.
        baseline: the original; both are in memory at once, and run in turns.
        batch: sequences at a time.
        prompt_tokens: random tokens before the first generated one.
        new_tokens: tokens generated after that.
        rounds: measured rounds, after one that is not.

    Returns:
        what `vqllm.evaluation.speed.bench` says.

    Raises:
        EvaluationError: numbers below 1, or more tokens than the model takes.
    """
    load = speed.Load(
        batch=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens, rounds=rounds
    )
    target, _ = load_to_run(model, _device(device), trust_remote_code)
    original = None
    if baseline is not None:
        original, _ = load_to_run(baseline, _device(device), trust_remote_code)
    return speed.bench(target, original, load)


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    chat: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Prompt and greedy continuation; the same as `vqllm generate`.

    Raises:
        EvaluationError: a prompt without tokens, that is not Unicode or too long for the model, or
            `chat` without a chat template.
    """
    if max_new_tokens < 1:
        raise EvaluationError(f"{max_new_tokens} new tokens: it must be 1 or more.")
    if not is_unicode(prompt):
        raise EvaluationError("the prompt has lone surrogates: pass text that is valid Unicode.")
    target, tokenizer = load_to_run(model, _device(device), trust_remote_code)
    if chat:
        prompt = _chat(tokenizer, prompt)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    num_tokens = inputs.input_ids.shape[1]
    if num_tokens == 0:
        raise EvaluationError(
            f"the prompt {prompt!r} has no tokens, and this model's tokenizer adds none: pass a "
            "text to go on from."
        )
    longest = evaluation.longest_input(target)
    if longest is not None and num_tokens + max_new_tokens > longest:
        raise EvaluationError(
            f"a prompt of {num_tokens} tokens and {max_new_tokens} new ones are more than the "
            f"{longest} positions of this model: pass a shorter prompt or fewer --max-new-tokens."
        )
    with torch.inference_mode():
        tokens = target.generate(
            **inputs.to(target.device), max_new_tokens=max_new_tokens, do_sample=False
        )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def _chat(tokenizer: Any, prompt: str) -> str:
    """The prompt as a user's message in the tokenizer's chat template."""
    try:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    except (ValueError, ImportError) as error:
        raise EvaluationError(
            f"--chat cannot be used with this model: {error} Leave it out for models that were "
            "not tuned to chat."
        ) from error


def _recipe(
    recipe: str | Path | Recipe | None,
    bits: float | None,
    preset: str | None,
    calibration: list[str] | None,
    seed: int | None,
    changes: tuple[str, ...],
) -> Recipe:
    """The recipe that the arguments of `quantize` mean."""
    if recipe is not None and (bits is not None or preset is not None):
        raise RecipeError("give a recipe, or a number of bits and a preset, not both.")
    if isinstance(recipe, Recipe):
        chosen = recipe
        if changes:
            raise RecipeError("changes apply to recipes by name or file; change the object itself.")
    else:
        if recipe is None:
            recipe = recipes.best(DEFAULT_BITS if bits is None else bits, preset or "balanced")
        chosen = recipes.load(recipe, changes)
    values = chosen.to_dict()
    if calibration is not None:
        values["calibration"]["source"] = calibration
    if seed is not None:
        values["seed"] = seed
    resolved = recipes.from_dict(values, chosen.name)
    # What is recorded with the result says how many, whatever later versions take by default.
    values["calibration"]["sequences"] = resolved.calibration.num_sequences
    return recipes.from_dict(values, chosen.name)


def _device(name: str | None) -> torch.device:
    if name is None and torch.cuda.is_available():
        # One of several processes takes the GPU of its number.
        own = os.environ.get("LOCAL_RANK", "0")
        return torch.device("cuda", int(own)) if own != "0" else torch.device("cuda")
    if name is None:
        return torch.device("cpu")
    known = _devices()
    if name not in known:
        raise ModelError(
            f"{name!r} is no device that torch sees here: use one of {', '.join(known)}."
        )
    return torch.device(name)


def _devices() -> list[str]:
    """The names of the devices that a model can run on, here and now."""
    names = ["cpu"]
    for kind, backend in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        if backend.is_available():
            names += [kind, *(f"{kind}:{i}" for i in range(backend.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names


def _dtype(name: str | None) -> torch.dtype | None:
    choices = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name is not None and name not in choices:
        raise RecipeError(f"compute dtype {name!r}: use {', '.join(choices)}.")
    return choices[name] if name else None
