"""What to do when a tuning run is out of memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vqllm.errors import ModelError
from vqllm.runs.tuning_job import TuningJob


@contextmanager
def memory_explained(job: TuningJob) -> Iterator[None]:
    """Within, running out of memory is a ModelError that says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        out = isinstance(error, torch.OutOfMemoryError | MemoryError)
        # torch has no class of its own for the memory of the processor.
        if not out and "can't allocate memory" not in str(error):
            raise
        raise ModelError(_advice(job)) from error


def _advice(job: TuningJob) -> str:
    ways = f"fewer sequences at a time, {_options(job, 'together', 1)}"
    if again := _options(job, "checkpointing", "true"):
        ways += f", or with activations computed again, {again}"
    if job.recipe.teacher == "live":
        ways += f", or with --set {job.within}teacher=cached"
    return (
        f"out of memory. What was tuned is kept: repeat the command with {ways}. If that is not "
        f"enough, lower {job.within}calibration.length (which begins the tuning again, in another "
        "folder), or take another --device."
    )


def _options(job: TuningJob, key: str, value: object) -> str:
    """The options that set a key in all stages that have it."""
    stages = job.recipe.stages
    numbers = [i for i, stage in enumerate(stages) if key in type(stage).model_fields]
    return " ".join(f"--set {job.within}stages.{i}.{key}={value}" for i in numbers)
