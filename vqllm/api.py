"""The Python interface: what the commands do, as functions."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vqllm.calibration.data.text_sources import is_unicode
from vqllm.core.progress import LogProgress, Progress
from vqllm.core.protocols import JSON
from vqllm.errors import EvaluationError
from vqllm.evaluation import perplexity as evaluation
from vqllm.evaluation import speed
from vqllm.evaluation.resident import resident_bytes
from vqllm.forecast.plan import Plan
from vqllm.hf.running import explained_run
from vqllm.models.load import load as load
from vqllm.models.load import load_to_run
from vqllm.models.resolve import resolve
from vqllm.recipes import Recipe, TuningRecipe
from vqllm.report.summary import Summary
from vqllm.runs import commands
from vqllm.runs.arguments import (
    CompareArguments,
    ExportArguments,
    PlanArguments,
    QuantizeArguments,
    TuneArguments,
    source_names,
)
from vqllm.runs.compare.result import ComparisonResult
from vqllm.runs.devices import device_of
from vqllm.runs.export_gguf import run as run_export
from vqllm.runs.measure import text_label
from vqllm.runs.plan import plan as plan_of


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | Recipe | None = None,
    bits: float | None = None,
    size: int | str | None = None,
    kl: float | None = None,
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
    allow_bin: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> Summary | None:
    """Quantize a model into a folder that transformers loads; the same as `vqllm quantize`.

    Args:
        model: "demo", a hub id, a folder or a `.gguf` file.
        output: the folder to write; an unfinished run of the same command goes on.
        recipe: a shipped recipe's name, a YAML file or a Recipe; with `bits` instead, the best
            recipe for that number of bits, 1.1 to 5 (2 when nothing is given).
        size: instead, the best recipe whose weight files, embedding and head included, have at
            most so many bytes, and hardly fewer: a number or a text ("60MB", "1.5GB").
        kl: instead, the best recipe for this KL divergence from the original's predictions, nats
            a token. If what is measured is off by more than 15 %, the model is quantized once
            more, with the expectation corrected by it.
        preset: with `bits`, `size` or `kl`: "fast" (bits only), "balanced" (the default) or "best",
            by the time of a run, or "tuned": the best quality, for which the whole model has to fit
            in memory with its gradients.
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
        allow_bin: whether weights that are pickles (`pytorch_model.bin`) may be loaded, as tensors
            and nothing else, and converted to safetensors in the cache, once.
        progress: receives events; None logs a line per layer.
        command: what the report says the checkpoint was made with.

    Returns:
        what came of it; None in all but the first of several processes that were started together.

    Raises:
        VqllmError: a mistake that the message explains; finished layers are kept.
    """
    given = QuantizeArguments(
        model=model,
        output=output,
        recipe=recipe,
        bits=bits,
        size=size,
        kl=kl,
        preset=preset,
        calibration=source_names(calibration),
        seed=seed,
        changes=changes,
        device=device,
        compute_dtype=compute_dtype,
        evaluate=evaluate,
        eval_text=eval_text,
        eval_windows=eval_windows,
        trust_remote_code=trust_remote_code,
        allow_bin=allow_bin,
    )
    return commands.quantize(given, command, progress or LogProgress())


def plan(
    model: str | Path,
    *,
    recipe: str | Path | Recipe | None = None,
    bits: float | None = None,
    size: int | str | None = None,
    kl: float | None = None,
    preset: str | None = None,
    calibration: str | Path | Iterable[str | Path] | None = None,
    seed: int | None = None,
    changes: tuple[str, ...] = (),
    device: str | None = None,
    compute_dtype: str | None = None,
    evaluate: bool = True,
    eval_text: str | Path | None = None,
    eval_windows: int | None = None,
    measure: bool = True,
    trust_remote_code: bool = False,
    allow_bin: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """What `quantize` with these arguments would give and take; the same as `vqllm plan`.

    Args:
        model: as in `quantize`; or a folder with a config.json and no weights, of which nothing is
            measured.
        measure: whether quality, time and memory are estimated from measurements on the model,
            which takes up to a minute for a small one. Sizes need none.
        recipe, bits, size, kl, preset, calibration, seed, changes, device, compute_dtype, evaluate,
            eval_text, eval_windows, trust_remote_code, allow_bin, progress: as in `quantize`.

    Raises:
        VqllmError: a mistake that `quantize` would end with.
    """
    given = PlanArguments(
        model=model,
        recipe=recipe,
        bits=bits,
        size=size,
        kl=kl,
        preset=preset,
        calibration=source_names(calibration),
        seed=seed,
        changes=changes,
        device=device,
        compute_dtype=compute_dtype,
        evaluate=evaluate,
        eval_text=eval_text,
        eval_windows=eval_windows,
        measure=measure,
        trust_remote_code=trust_remote_code,
        allow_bin=allow_bin,
    )
    return plan_of(given, progress or LogProgress())


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
    allow_bin: bool = False,
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
            eval_windows, trust_remote_code, allow_bin, progress and command.

    Returns:
        None in all but the first of several processes (`torchrun`), which share the sequences of
        every step.

    Raises:
        VqllmError: a mistake that the message explains; the last saved state stays.
    """
    given = TuneArguments(
        checkpoint=checkpoint,
        output=output,
        recipe=recipe,
        teacher=teacher,
        calibration=source_names(calibration),
        seed=seed,
        time=time,
        changes=changes,
        device=device,
        evaluate=evaluate,
        eval_text=eval_text,
        eval_windows=eval_windows,
        trust_remote_code=trust_remote_code,
        allow_bin=allow_bin,
    )
    return commands.tune(given, command, progress or LogProgress())


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
    allow_bin: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> ComparisonResult:
    """Quantize a model with several recipes, and rank them; the same as `vqllm compare`.

    Each member is a run of `quantize` in a folder of its own. The original's predictions on the
    text, and calibration sequences that members share, are computed once.

    Args:
        model: as in `quantize`; so are calibration, seed, changes, device, compute_dtype,
            eval_windows, trust_remote_code, allow_bin, progress and command.
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
    given = CompareArguments(
        model=model,
        output=output,
        recipe=[recipe] if isinstance(recipe, str | Path | Recipe) else list(recipe),
        grid=grid,
        changes=changes,
        calibration=source_names(calibration),
        seed=seed,
        device=device,
        compute_dtype=compute_dtype,
        eval_text=eval_text,
        eval_windows=eval_windows,
        keep_checkpoints=keep_checkpoints,
        trust_remote_code=trust_remote_code,
        allow_bin=allow_bin,
    )
    return commands.compare(given, command, progress or LogProgress())


def export_gguf(
    model: str | Path,
    output: str | Path,
    *,
    type: str | None = None,
    mix: str | Sequence[str] | None = None,
    size: str | int | None = None,
    calibration: str | Path | Iterable[str | Path] | None = None,
    sequences: int | None = None,
    seed: int = 0,
    converter: str | Path | None = None,
    device: str | None = None,
    compute_dtype: str | None = None,
    trust_remote_code: bool = False,
    allow_bin: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a dense model as a GGUF file for llama.cpp; the same as `vqllm export-gguf`.

    Args:
        output: a new file whose name ends in `.gguf`.
        type: a native type of llama.cpp for the linears of the layers: "Q3_K", ...
        mix: the types that tensors may get, "default" or names; each tensor gets the one that pays
            most for its sensitivity. The file is as large as with `type` alone, or as `size` says.
        size: of the whole file, bytes or "80MB"; without `mix`, the default types are mixed.
        sequences: number of calibration sequences of 128 tokens; None takes as many as `quantize`.
        converter: llama.cpp's `convert_hf_to_gguf.py`; None takes the installed package. A model
            that is a GGUF file itself needs none.
        model, calibration, seed, device, compute_dtype, trust_remote_code, allow_bin, progress: as
            in `quantize`.

    Returns:
        The path of the file. It appears whole, or not at all.

    Raises:
        VqllmError: an unknown type, a size that cannot be met, a quantized model, an architecture
            that the converter does not know, or no converter; the message says what to do.
    """
    given = ExportArguments(
        model=model,
        output=output,
        type=type,
        mix=mix,
        size=size,
        calibration=source_names(calibration),
        sequences=sequences,
        seed=seed,
        converter=converter,
        device=device,
        compute_dtype=compute_dtype,
        trust_remote_code=trust_remote_code,
        allow_bin=allow_bin,
    )
    return run_export(given, progress or LogProgress())


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
    allow_bin: bool = False,
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
        trust_remote_code, allow_bin: as in `quantize`.

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
    # Its import takes a second, and the mistakes it finds should not wait for the model.
    manager = None
    if tasks:
        from vqllm.integrations import lm_eval

        manager = lm_eval.task_manager(tasks, data=data, limit=limit)
    # Perplexity on the text, or the comparison with the baseline.
    target, tokenizer = load_to_run(
        model, device_of(device), trust_remote_code, allow_bin=allow_bin
    )
    results: JSON = {"model": str(model)}
    if text is not None:
        tokens = evaluation.text_windows(text, tokenizer, num_windows, window_length)
        label = text_label(text, tokens)
        if baseline is None:
            results["text"] = evaluation.perplexity(target, tokens, label).to_dict()
        else:
            original, other = load_to_run(
                baseline, device_of(device), trust_remote_code, allow_bin=allow_bin
            )
            evaluation.check_same_tokens(
                tokens, evaluation.text_windows(text, other, num_windows, window_length)
            )
            results["text"] = evaluation.compare(target, original, tokens, label).to_dict()
            del original  # tasks are those of one model
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
    prompts: Sequence[int] = (),
    resident: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
    allow_bin: bool = False,
) -> JSON:
    """Time a model, beside its original or alone; the same as `vqllm bench`.

    Args:
        model: a quantized folder, or anything that names a model.
        baseline: the original; both are in memory at once, and run in turns.
        batch: sequences at a time.
        prompt_tokens: random tokens before the first generated one.
        new_tokens: tokens generated after that.
        rounds: measured rounds, after one that is not.
        prompts: tokens of further prompts to be timed, where the models take so many.
        resident: measure the memory of the processes, too, each model in one of its own, on a CPU.
        trust_remote_code, allow_bin: as in `quantize`.

    Returns:
        what `vqllm.evaluation.speed.bench` says; with `resident` every model has the
        "resident_bytes" of `vqllm.evaluation.resident`.

    Raises:
        EvaluationError: numbers below 1, or more tokens than the model takes.
    """
    load = speed.Load(
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        prompts=tuple(prompts),
    )
    place = device_of(device)
    target, _ = load_to_run(
        model, place, trust_remote_code, needs_tokenizer=False, allow_bin=allow_bin
    )
    original = None
    if baseline is not None:
        original, _ = load_to_run(
            baseline, place, trust_remote_code, needs_tokenizer=False, allow_bin=allow_bin
        )
    results = speed.bench(target, original, load)
    if resident and place.type == "cpu":
        del target, original
        for name, given in (("model", model), ("original", baseline)):
            if given is not None:
                folder = resolve(given, trust_remote_code=trust_remote_code, allow_bin=allow_bin)
                results["models"][name]["resident_bytes"] = resident_bytes(
                    folder.path, trust_remote_code=trust_remote_code
                )
    return results


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    chat: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
    allow_bin: bool = False,
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
    target, tokenizer = load_to_run(
        model, device_of(device), trust_remote_code, allow_bin=allow_bin
    )
    if chat:
        prompt = _chat(tokenizer, prompt)
    # What the model cannot go on from is refused here, where the message can say what to do.
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
    with torch.inference_mode(), explained_run(target):
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
    except Exception as error:  # a template is a program: jinja raises what it raises
        raise EvaluationError(
            f"--chat cannot be used with this model: {error} Leave it out for models that were "
            "not tuned to chat."
        ) from error
