"""The Python interface: what the commands do, as functions."""

import inspect
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from vqllm import evaluation, memory, models
from vqllm import recipe as recipes
from vqllm.checkpoint.inspect import bits_per_weight
from vqllm.checkpoint.reader import Checkpoint, is_checkpoint
from vqllm.checkpoint.shards import read_header
from vqllm.errors import EvaluationError, ModelError, RecipeError
from vqllm.pipeline import Job, Outcome, open_run
from vqllm.pipeline import quantize as run_pipeline
from vqllm.progress import LogProgress, Progress
from vqllm.recipe import Recipe
from vqllm.report.pages import write_report
from vqllm.report.summary import Summary
from vqllm.types import JSON

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

DEFAULT_BITS = 2


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | Recipe | None = None,
    bits: int | None = None,
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
        calibration: sources in place of the recipe's: "self", files, folders, datasets ids.
        seed: in place of the recipe's.
        changes: `dotted.key=value` changes of the recipe.
        device: "cpu", "cuda", ...; None takes a GPU if there is one.
        compute_dtype: dtype in which layers run; None chooses by source dtype and device.
        evaluate: measure the result against the original.
        eval_text: a text file to measure on; None takes 16 held-out sequences of the calibration
            sources.
        eval_windows: use the first windows of 2048 tokens of the text only.
        trust_remote_code: whether Python code in the model's folder may run.
        progress: receives events; None logs a line per layer.
        command: what the report says the checkpoint was made with.

    Raises:
        VqllmError: a mistake that the message explains; finished layers are kept.
    """
    if calibration is not None:
        one = isinstance(calibration, str | Path)
        calibration = [str(x) for x in ([calibration] if one else calibration)]
    command = command or _call(locals())
    chosen = _recipe(recipe, bits, calibration, seed, changes)
    progress = progress or LogProgress()
    resolved = models.resolve(model, trust_remote_code=trust_remote_code)
    job = Job(
        source=resolved.path,
        model=resolved.name,
        recipe=chosen,
        output=Path(output),
        device=_device(device),
        compute_dtype=_dtype(compute_dtype),
        trust_remote_code=trust_remote_code,
    )
    with open_run(job) as run:
        outcome = run_pipeline(job, run, progress)
        start = time.perf_counter()
        evaluation = None
        if evaluate:
            progress.phase("evaluation against the original")
            evaluation = _compare_with_original(job, outcome, eval_text, eval_windows)
        seconds = {**outcome.seconds, "evaluation": time.perf_counter() - start}
        summary = Summary(
            model=resolved.name,
            hub_id=resolved.hub_id,
            recipe=chosen.name,
            command=command,
            output=job.output,
            bytes_before=_weight_bytes(job.source),
            bytes_after=_weight_bytes(job.output),
            bits_per_weight=bits_per_weight(Checkpoint.open(job.output, verify=False)),
            seconds=seconds,
            peak_memory_bytes=memory.peak_resident(),
            evaluation=evaluation,
            not_quantized=outcome.not_quantized,
        )
        write_report(job.output, outcome.records, summary, chosen.to_yaml())
        run.complete()
    return summary


def _call(arguments: dict[str, Any]) -> str:
    """The call of `quantize` with these arguments as Python text; what has its default is left
    out."""
    shown = []
    for name, parameter in inspect.signature(quantize).parameters.items():
        value = arguments[name]
        if isinstance(value, Recipe):
            shown.append(f"{name}=vqllm.recipe.from_dict({value.to_dict()!r}, {value.name!r})")
        elif parameter.default is inspect.Parameter.empty:
            shown.append(repr(str(value)))
        elif name != "progress" and value != parameter.default:
            plain = str(value) if isinstance(value, Path) else value
            shown.append(f"{name}={plain!r}")
    return f"vqllm.quantize({', '.join(shown)})"


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model to run it, quantized by vqllm or not, and its tokenizer.

    Args:
        path: a quantized folder, or anything that names a model: an ordinary folder, a `.gguf`
            file, a hub id, "demo".
        dtype: of activations and of everything that is not packed; "auto" is that of the folder.
        device_map: as in transformers: None is the CPU, "auto" whatever there is, or a dictionary.
        verify: compare a checkpoint's shards with their checksums first.
        trust_remote_code: whether Python code found in the folder may be executed.

    Returns:
        The model in evaluation mode, and its tokenizer, or None if the folder has none.

    Raises:
        ModelError: there is no such model, or transformers cannot load it.
        CheckpointError: it is quantized, but damaged or of a newer format; names the file.
    """
    folder = models.resolve(path, trust_remote_code=trust_remote_code).path
    if is_checkpoint(folder):
        Checkpoint.open(folder, verify)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
        tokenizer = None
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be loaded by transformers: {error}") from error
    return model.eval(), tokenizer


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
        EvaluationError: nothing to do, an unknown task, a text that is too short.
    """
    if text is None and not tasks:
        raise EvaluationError("nothing to measure: pass --text FILE, --tasks NAME, or both.")
    if baseline is not None and text is None:
        raise EvaluationError("a baseline is compared on a text: pass --text FILE as well.")
    target, tokenizer = _load_to_run(model, device, trust_remote_code)
    results: JSON = {"model": str(model)}
    if text is not None:
        tokens = evaluation.text_windows(text, tokenizer, num_windows, window_length)
        label = _text_label(text, tokens)
        if baseline is None:
            results["text"] = evaluation.perplexity(target, tokens, label).to_dict()
        else:
            original, _ = _load_to_run(baseline, device, trust_remote_code)
            results["text"] = evaluation.compare(target, original, tokens, label).to_dict()
            del original
    if tasks:
        from vqllm.integrations import lm_eval

        results["tasks"] = lm_eval.run_tasks(target, tokenizer, tasks, data=data, limit=limit)
    return results


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    chat: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Prompt and greedy continuation; the same as `vqllm generate`."""
    target, tokenizer = _load_to_run(model, device, trust_remote_code)
    if chat:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    with torch.inference_mode():
        tokens = target.generate(
            **inputs.to(target.device), max_new_tokens=max_new_tokens, do_sample=False
        )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def _recipe(
    recipe: str | Path | Recipe | None,
    bits: int | None,
    calibration: list[str] | None,
    seed: int | None,
    changes: tuple[str, ...],
) -> Recipe:
    """The recipe that the arguments of `quantize` mean."""
    if recipe is not None and bits is not None:
        raise RecipeError("give a recipe or a number of bits, not both.")
    if isinstance(recipe, Recipe):
        chosen = recipe
        if changes:
            raise RecipeError("changes apply to recipes by name or file; change the object itself.")
    else:
        chosen = recipes.load(recipe or recipes.best(bits or DEFAULT_BITS), changes)
    values = chosen.to_dict()
    if calibration:
        values["calibration"]["source"] = calibration
    if seed is not None:
        values["seed"] = seed
    return recipes.from_dict(values, chosen.name)


def _compare_with_original(
    job: Job, outcome: Outcome, text: str | Path | None, num_windows: int | None
) -> JSON:
    device = str(job.device)
    original, tokenizer = _load_to_run(job.source, device, job.trust_remote_code)
    quantized, _ = _load_to_run(job.output, device, job.trust_remote_code)
    if text is not None:
        tokens = evaluation.text_windows(text, tokenizer, num_windows)
        label = _text_label(text, tokens)
    else:
        tokens = outcome.held_out
        source = "+".join(Path(name).name for name in job.recipe.calibration.source)
        label = f"{len(tokens)} held-out sequences of {tokens.shape[1]} tokens ({source})"
    return evaluation.compare(quantized, original, tokens, label).to_dict()


def _text_label(text: str | Path, tokens: torch.Tensor) -> str:
    return f"{Path(text).name}, {len(tokens)} windows of {tokens.shape[1]} tokens"


def _load_to_run(model: str | Path, device: str | None, trust_remote_code: bool) -> tuple[Any, Any]:
    """Model and tokenizer on the chosen device; on a CPU in bfloat16, which is there 3 times as
    fast as float16 and 4 times as fast as float32."""
    target = _device(device)
    loaded, tokenizer = load(
        model,
        dtype=torch.bfloat16 if target.type == "cpu" else "auto",
        device_map=None if target.type == "cpu" else str(target),
        trust_remote_code=trust_remote_code,
    )
    if tokenizer is None:
        raise ModelError(f"{model} has no tokenizer: save one into its folder.")
    return loaded, tokenizer


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"{name!r} is no device: use cpu, cuda, cuda:1, ...") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {name}: torch sees no GPU here. Use --device cpu.")
    return device


def _dtype(name: str | None) -> torch.dtype | None:
    choices = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name is not None and name not in choices:
        raise RecipeError(f"compute dtype {name!r}: use {', '.join(choices)}.")
    return choices[name] if name else None


def _weight_bytes(folder: Path) -> int:
    """Bytes of all tensors in the safetensors files of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    return sum(tensor.num_bytes for file in files for tensor in read_header(file).values())
