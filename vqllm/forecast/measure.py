"""What a plan measures on the model: text, gradients, one layer, and the matrices outside."""

import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vqllm.allocation.choose_codecs import choose_codecs
from vqllm.core import memory
from vqllm.core.progress import Progress
from vqllm.core.protocols import Codec
from vqllm.forecast.gradients import PassMeasured, measure_gradients
from vqllm.forecast.text import FewText, few_sequences
from vqllm.forecast.trial import Trial, try_layer
from vqllm.hf.classes import predicts_tokens
from vqllm.hf.decoder_layers import layer_names
from vqllm.plan.costs import Shape
from vqllm.plan.job import Job
from vqllm.plan.packed_spec import linear_spec
from vqllm.plan.selection import Selection
from vqllm.quantization import embeddings as outside
from vqllm.quantization.checks import Checked
from vqllm.quantization.row_blocks import Matrix, quantize_rows
from vqllm.recipes import Recipe

SAMPLE_ROWS = 2048
"""Of a matrix outside the layers, rows that are coded for the clock."""


@dataclass
class Measured:
    """What was measured."""

    text: FewText
    base_bytes: int
    """of the process before"""
    found: PassMeasured | None
    """None where the model predicts no tokens, or does not run with gradients"""
    codecs: dict[str, Codec]
    """of linears, where the recipe has a budget"""
    trial: Trial
    ends: dict[str, float] = field(default_factory=dict)
    """seconds for each matrix outside the layers"""
    head: float = 0.0
    """seconds a token for logits and their divergence"""


@dataclass(frozen=True)
class Look:
    """What can be measured before codecs are chosen; it serves for all recipes with the same
    transforms and rounding."""

    base_bytes: int
    text: FewText
    index: int
    """of the layer that is tried"""
    found: PassMeasured | None


def look(job: Job, checked: Checked, progress: Progress) -> Look:
    """Text, and the pass with gradients. Errors as of the run."""
    memory.keep_large_blocks_apart()
    memory.restart_peak()
    base = memory.peak_resident()
    progress.phase("few sequences of the calibration text")
    text = few_sequences(job)
    model = checked.tensors.blueprint.model
    index = _middle(checked.selection, layer_names(model))
    found = None
    if predicts_tokens(model.config) and not text.note:
        progress.phase("gradients of the predictions, few sequences")
        with tempfile.TemporaryDirectory() as folder:
            found = measure_gradients(job, checked, text.tokens, index, Path(folder), progress)
    return Look(base, text, index, found)


def measure(job: Job, checked: Checked, progress: Progress, seen: Look | None = None) -> Measured:
    """Measure all. Errors as of the run.

    Args:
        seen: by an earlier look.
    """
    seen = seen or look(job, checked, progress)
    base, text, index, found = seen.base_bytes, seen.text, seen.index, seen.found
    model = checked.tensors.blueprint.model
    with tempfile.TemporaryDirectory() as folder:
        codecs = chosen_codecs(checked.selection, job.recipe, found)
        progress.phase(f"calibrating and rounding a linear of each shape of layer {index}")
        common = _most_common(checked.selection, codecs)
        trial = try_layer(job, checked, text.tokens, index, found, common, Path(folder))
    return Measured(
        text=text,
        base_bytes=base,
        found=found,
        codecs=codecs,
        trial=trial,
        ends={
            matrix.names[0]: _clock_rows(job, checked, matrix)
            for matrix in outside.plan(model, job.recipe)
        },
        head=_clock_head(model.config.get_text_config(), job.device),
    )


def chosen_codecs(
    selection: Selection, recipe: Recipe, found: PassMeasured | None
) -> dict[str, Codec]:
    """The codec of each linear within the recipe's budget; empty if it has none."""
    if recipe.allocation is None or found is None:
        return {}
    losses = found.losses.table(selection, recipe.codecs)
    chosen = choose_codecs(selection, losses, recipe)
    return {name: recipe.codecs[int(number)] for name, (number, _) in chosen.items()}


def _middle(selection: Selection, layers: list[str]) -> int:
    """The middle one of the layers that have something to quantize."""
    own = [
        index
        for index, name in enumerate(layers)
        if any(linear.startswith(f"{name}.") for linear in selection.shapes)
    ]
    return own[len(own) // 2]


def _most_common(selection: Selection, codecs: Mapping[str, Codec]) -> dict[Shape, Codec]:
    kinds = {repr(codec): codec for codec in codecs.values()}
    by_shape: dict[Shape, Counter[str]] = {}
    for name, codec in codecs.items():
        by_shape.setdefault(selection.shapes[name], Counter())[repr(codec)] += 1
    return {shape: kinds[counts.most_common(1)[0][0]] for shape, counts in by_shape.items()}


def _clock_rows(job: Job, checked: Checked, matrix: Matrix) -> float:
    """Seconds to code all rows of a matrix outside the layers, from those of some."""
    rows = min(SAMPLE_ROWS, matrix.spec.rows)
    spec = linear_spec(rows, matrix.spec.cols, matrix.recipe)
    few = Matrix(names=matrix.names, recipe=matrix.recipe, spec=spec, is_head=matrix.is_head)
    name = next(own for own in matrix.names if f"{own}.weight" in checked.tensors)
    H_CC = torch.eye(matrix.spec.cols, device=job.device) if matrix.is_head else None
    start = time.perf_counter()
    quantize_rows(
        few,
        lambda start, stop: checked.tensors.read_rows(f"{name}.weight", start, stop),
        job.device,
        H_CC,
    )
    return (time.perf_counter() - start) * matrix.spec.rows / rows


def _clock_head(config: Any, device: torch.device) -> float:
    """Seconds a token for the logits of two models and their divergence."""
    num = 256
    x_NC = torch.randn(num, config.hidden_size, device=device, dtype=torch.bfloat16)
    W_VC = torch.randn(config.vocab_size, config.hidden_size, device=device, dtype=torch.bfloat16)
    start = time.perf_counter()
    first, second = (torch.log_softmax((x_NC @ W_VC.T).float(), -1) for _ in range(2))
    ((first - second) * first.exp()).sum()
    return (time.perf_counter() - start) / num
