"""Few calibration sequences of the kind that a run takes, and how long all of its own will take."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vqllm.calibration.data.calibration_set import (
    SELF,
    calibration_sequences,
    held_out_of,
    sequences_in_cache,
)
from vqllm.calibration.data.self_samples import generate_samples
from vqllm.checkpoint.stored import tensors_to_load
from vqllm.core import memory
from vqllm.hf.loading import load_config, load_model, load_tokenizer
from vqllm.plan.job import Job

TOKENS = 2048
"""Of the sequences that a plan is made with."""
FEW_STEPS = 4
"""Tokens of sequences that are sampled for the clock, as many at once as a run samples."""


@dataclass(frozen=True)
class FewText:
    """Sequences, int64 [S, L], and what a run's own take."""

    tokens: Tensor
    seconds: float
    peak_bytes: int = 0
    """of the sampling"""
    note: str = ""


def few_sequences(job: Job) -> FewText:
    """The first sequences of the job's text; random tokens where only samples of the model would
    do, and the model does not fit in memory. Errors as of the run."""
    calibration = job.recipe.calibration
    length = calibration.length
    num = min(calibration.num_sequences, max(2, math.ceil(TOKENS / length)))
    files = tuple(name for name in calibration.source if name != SELF)
    if files:
        start = time.perf_counter()
        found = calibration_sequences(
            job.source,
            files,
            num,
            length,
            job.recipe.seed,
            job.device,
            job.trust_remote_code,
        )
        return FewText(found.calibration, time.perf_counter() - start)
    if not fits(job):
        config = load_config(job.source, trust_remote_code=job.trust_remote_code)
        generator = torch.Generator().manual_seed(job.recipe.seed)
        vocabulary = config.get_text_config().vocab_size
        tokens = torch.randint(vocabulary, (num, length), generator=generator)
        note = (
            "the model does not fit in the free memory, so it cannot be sampled for calibration "
            "text, neither here nor in the run: pass --calibration FILE"
        )
        return FewText(tokens, 0.0, note=note)
    return _sampled(job, num, length)


def fits(job: Job) -> bool:
    """Whether the whole model fits in the memory that is free."""
    num_bytes = sum(path.stat().st_size for path in job.source.glob("*.safetensors"))
    free = memory.available()
    return job.device.type != "cpu" or free is None or num_bytes < free


def _sampled(job: Job, num: int, length: int) -> FewText:
    """Samples, and the time of all from that of few at full length, and of all for few steps."""
    memory.restart_peak()
    start = time.perf_counter()
    tokenizer = load_tokenizer(job.source, trust_remote_code=job.trust_remote_code)
    model = load_model(
        job.source,
        trust_remote_code=job.trust_remote_code,
        tensors=tensors_to_load(job.source),
        dtype=torch.bfloat16 if job.device.type == "cpu" else "auto",
        device_map=str(job.device),
    )
    loading = time.perf_counter() - start
    wanted = job.recipe.calibration.num_sequences
    wanted += held_out_of(wanted, length)
    together = min(wanted, sequences_in_cache(model.config.get_text_config(), length))

    def sample(num: int, steps: int) -> Tensor:
        seed = job.recipe.seed
        return generate_samples(model, tokenizer, num, steps, seed, batch_size=max(num, 1))

    few = min(FEW_STEPS, length)
    tokens, whole = _clocked(lambda: sample(num, length))
    _, own = _clocked(lambda: sample(num, few))
    _, all_of_them = _clocked(lambda: sample(together, few))
    # A step takes longer with more tokens before it.
    growth = max(1.0, whole / length / max(own / few, 1e-9))
    seconds = loading + math.ceil(wanted / together) * length * all_of_them / few * growth
    return FewText(tokens, seconds, memory.peak_resident())


def _clocked(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    start = time.perf_counter()
    made = call()
    return made, time.perf_counter() - start
