"""A plan from its parts: sizes, and what was measured."""

from vqllm.core.progress import Progress
from vqllm.forecast.plan import Plan
from vqllm.forecast.sizes import codecs_by_size, sizes
from vqllm.plan.job import Job
from vqllm.quantization.checks import Checked

UNMEASURED = (
    "nothing was measured: quality, time and memory are not estimated, and which linear gets which "
    "codec of a budget is a guess"
)


def plan_of(job: Job, checked: Checked, measure: bool, progress: Progress) -> Plan:
    """The plan of a job.

    Args:
        checked: its model.
        measure: whether the model's weights are there, and may be read.
    """
    recipe = job.recipe
    own = sizes(checked, recipe, codecs_by_size(checked.selection, recipe))
    return Plan(
        model=job.model,
        recipe=recipe.name,
        recipe_values=recipe.to_dict(),
        bytes_before=own.before,
        bytes_after=own.files.tensors,
        file_bytes=own.files.files,
        bits_per_weight=own.bits_per_weight,
        parameters=own.parameters,
        not_quantized=own.not_quantized,
        disk={"checkpoint": own.files.files},
        notes=(UNMEASURED,),
    )
