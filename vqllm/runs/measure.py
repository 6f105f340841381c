"""What the result of a run is measured on, and its measurement against the original."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vqllm.core.protocols import JSON
from vqllm.evaluation import perplexity as evaluation
from vqllm.hf.loading import load_config, load_tokenizer, max_length
from vqllm.models.load import load_to_run
from vqllm.plan.job import Job
from vqllm.recipes import Recipe, TuningRecipe


@dataclass(frozen=True)
class Windows:
    """What models are measured on: int64 tokens [S, L], and what to call them."""

    tokens_SL: Tensor
    label: str


def measure_against_original(
    job: Job,
    windows: Windows,
    baseline_of: Callable[[Any, Tensor], Any] = lambda original, _: original,
) -> JSON:
    """What `evaluation.compare` says of a quantized model, whose folder is all but closed.

    Args:
        baseline_of: what to call in place of the original model, given that model and the tokens.
    """
    original, _ = load_to_run(job.source, job.device, job.trust_remote_code)
    quantized, _ = load_to_run(job.output, job.device, job.trust_remote_code)
    baseline = baseline_of(original, windows.tokens_SL)
    return evaluation.compare(quantized, baseline, windows.tokens_SL, windows.label).to_dict()


def held_out_windows(recipe: Recipe | TuningRecipe, tokens_SL: Tensor) -> Windows:
    """The held-out calibration sequences of a run."""
    num, length = tokens_SL.shape
    source = "+".join(Path(name).name for name in recipe.calibration.source)
    return Windows(tokens_SL, f"{num} held-out sequences of {length} tokens ({source})")


def text_windows(
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
