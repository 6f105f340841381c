"""A plan from its parts: sizes, and what was measured."""

from dataclasses import replace

from vqllm.core import memory
from vqllm.core.progress import Progress
from vqllm.forecast.divergence import estimates, expected_kl
from vqllm.forecast.measure import Look, measure
from vqllm.forecast.plan import Plan
from vqllm.forecast.scale import Scope, disk, peaks, seconds
from vqllm.forecast.sizes import codecs_by_size, sizes
from vqllm.plan.job import Job
from vqllm.quantization.checks import Checked

UNMEASURED = (
    "nothing was measured: quality, time and memory are not estimated, and which linear gets which "
    "codec of a budget is a guess"
)


def plan_of(
    job: Job,
    checked: Checked,
    progress: Progress,
    *,
    windows: tuple[int, int] | None = None,
    evaluate: bool = True,
    may_measure: bool = True,
    seen: Look | None = None,
) -> Plan:
    """The plan of a job.

    Args:
        checked: its model.
        windows: number and length of those that the result is measured on; None takes held-out
            sequences.
        evaluate: whether it is measured.
        may_measure: whether the model's weights are there, and may be read.
        seen: what was measured before.

    Raises:
        VqllmError: a mistake that the run would end with.
    """
    recipe = job.recipe
    measured = measure(job, checked, progress, seen) if may_measure else None
    codecs = measured.codecs if measured is not None else {}
    own = sizes(checked, recipe, codecs or codecs_by_size(checked.selection, recipe))
    scope = Scope.of(job, checked, windows, evaluate, own.files.tensors)
    plan = Plan(
        model=job.model,
        recipe=recipe.name,
        recipe_values=recipe.to_dict(),
        bytes_before=own.before,
        bytes_after=own.files.tensors,
        file_bytes=own.files.files,
        bits_per_weight=own.bits_per_weight,
        parameters=own.parameters,
        not_quantized=own.not_quantized,
        disk=disk(job, checked, scope, own.files.files),
        notes=(UNMEASURED,),
    )
    if measured is None:
        return plan
    kl = expected_kl(job, checked, measured)
    expected = (None, None) if kl is None else estimates(kl)
    return replace(
        plan,
        kl=expected[0],
        perplexity_ratio=expected[1],
        seconds=seconds(job, checked, measured, scope),
        memory=peaks(job, measured, scope) if memory.restart_peak() else {},
        notes=(measured.text.note,) if measured.text.note else (),
    )
