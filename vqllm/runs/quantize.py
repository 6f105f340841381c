"""A whole run: the loop over the layers, the measurement of its result, the pages about it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vqllm.checkpoint.inspect import bits_per_weight
from vqllm.checkpoint.reader import Checkpoint
from vqllm.checkpoint.resume.run_folder import RunFolder
from vqllm.core import memory
from vqllm.core.progress import Progress
from vqllm.core.protocols import JSON
from vqllm.evaluation import perplexity as evaluation
from vqllm.hf.loading import load_config, load_tokenizer, max_length
from vqllm.models.load import load_to_run
from vqllm.plan.job import Job
from vqllm.quantization.loop import open_run, sequences_of
from vqllm.quantization.loop import quantize as run_pipeline
from vqllm.recipes import Recipe, TuningRecipe
from vqllm.report.pages import report_pages
from vqllm.report.summary import Summary


@dataclass(frozen=True)
class Windows:
    """What models are measured on: int64 tokens [S, L], and what to call them."""

    tokens_SL: Tensor
    label: str


Measure = Callable[[Job, Tensor], JSON]
"""Measures a quantized model whose folder is all but closed; is given the held-out calibration
sequences, and returns what `evaluation.compare` does."""

Make = Callable[[], dict[str, Tensor]]
Prepare = Callable[[RunFolder, Recipe | TuningRecipe, Make], None]
"""Is given a folder that was opened, the recipe, and what makes its calibration sequences."""


def run(
    job: Job,
    measure: Measure | None,
    *,
    hub_id: str | None,
    command: str,
    progress: Progress,
    prepare: Prepare = lambda *_: None,
    keep: Callable[[Summary], None] = lambda _: None,
) -> Summary:
    """Quantize, measure and write the pages, going on where an earlier run of the job stopped.

    Args:
        measure: None leaves the result unmeasured.
        hub_id: the model's repository on the hub, where that is known.
        command: what the pages say the checkpoint was made with.
        prepare: is called before anything is computed.
        keep: is given the summary before the folder is closed; until it returns, the run is
            unfinished.

    Raises:
        VqllmError: a mistake that the message explains; finished layers are kept.
    """
    with open_run(job) as folder:
        prepare(
            folder,
            job.recipe,
            lambda: sequences_of(job.source, job.recipe, job.device, job.trust_remote_code),
        )
        outcome = run_pipeline(job, folder, progress)
        start = time.perf_counter()
        measured = None
        if measure is not None:
            progress.phase("evaluation against the original")
            measured = measure(job, outcome.held_out)
        seconds = {**outcome.seconds, "evaluation": time.perf_counter() - start}
        written = Checkpoint.open(job.output, verify=False)
        summary = Summary(
            model=job.model,
            hub_id=hub_id,
            recipe=job.recipe.name,
            command=command,
            output=job.output,
            bytes_before=folder.source_bytes(),
            bytes_after=written.num_bytes,
            bits_per_weight=bits_per_weight(written),
            seconds=seconds,
            peak_memory_bytes=memory.peak_resident(),
            evaluation=measured,
            not_quantized=outcome.not_quantized,
        )
        keep(summary)
        folder.complete(report_pages(outcome.records, summary, job.recipe.to_yaml()))
    return summary


def measure_on(
    windows: Windows | None, baseline_of: Callable[[Any, Tensor], Any] = lambda model, _: model
) -> Measure:
    """The measurement on some windows, or on what the run itself held out.

    Args:
        baseline_of: what to call in place of the original model, given that model and the windows.
    """

    def measure(job: Job, held_out_SL: Tensor) -> JSON:
        chosen = windows or held_out(job.recipe, held_out_SL)
        original, _ = load_to_run(job.source, job.device, job.trust_remote_code)
        quantized, _ = load_to_run(job.output, job.device, job.trust_remote_code)
        baseline = baseline_of(original, chosen.tokens_SL)
        return evaluation.compare(quantized, baseline, chosen.tokens_SL, chosen.label).to_dict()

    return measure


def held_out(recipe: Recipe | TuningRecipe, tokens_SL: Tensor) -> Windows:
    """The held-out calibration sequences of a run."""
    num, length = tokens_SL.shape
    source = "+".join(Path(name).name for name in recipe.calibration.source)
    return Windows(tokens_SL, f"{num} held-out sequences of {length} tokens ({source})")


def windows_of(
    source: Path, text: str | Path, num_windows: int | None, trust_remote_code: bool
) -> Windows:
    """The first windows of a text, as long as the model in the folder `source` takes them.

    Raises:
        EvaluationError: the text cannot be read or has fewer windows.
    """
    config = load_config(source, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    length = min(evaluation.WINDOW_LENGTH, max_length(config) or evaluation.WINDOW_LENGTH)
    tokens_SL = evaluation.text_windows(text, tokenizer, num_windows, length)
    return Windows(tokens_SL, text_label(text, tokens_SL))


def text_label(text: str | Path, tokens_SL: Tensor) -> str:
    """What results say they were measured on."""
    return f"{Path(text).name}, {len(tokens_SL)} windows of {tokens_SL.shape[1]} tokens"
