"""Whether the processes of a run were started for the same work, found out before it begins."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from vqllm.checkpoint.format import JSON
from vqllm.checkpoint.resume.journal import differences, identity
from vqllm.core.distributed import Processes
from vqllm.errors import ProcessError
from vqllm.plan.job import Job

SAMPLE_BYTES = 1 << 16
NUM_SAMPLES = 16


def check_agreement(job: Job, processes: Processes) -> None:
    """Raise ProcessError, in every process, where one has another model, recipe, text or version
    than the first. The places of files may differ."""
    if processes.size == 1:
        return
    settings = {"device": job.device.type, "compute_dtype": str(job.compute_dtype or "auto")}
    recipe = job.recipe.to_dict()
    texts = [*job.recipe.calibration.source]
    if job.recipe.tune is not None:
        texts += job.recipe.tune.calibration.source
    own: JSON = identity(
        model="",
        source=job.source,
        recipe=recipe,
        settings=settings,
        trust_remote_code=job.trust_remote_code,
    )
    found = processes.gather((own, _texts(texts)))
    first, first_texts = found[0]
    for rank, (other, other_texts) in enumerate(found):
        both = first_texts.keys() & other_texts.keys()  # the first process reads them for all
        lines = differences(first, other) + differences(
            {f"text {name}": first_texts[name] for name in both},
            {f"text {name}": other_texts[name] for name in both},
        )
        if lines:
            raise ProcessError(
                f"the processes were started for different work (process 0 → process {rank}):\n"
                + "\n".join(lines)
                + "\nStart all with the same command, model, texts and versions."
            )


def _texts(sources: Iterable[str]) -> dict[str, str]:
    """A digest of every source that is a file here."""
    return {name: _digest(Path(name)) for name in sources if Path(name).is_file()}


def _digest(path: Path) -> str:
    """Of the size and of samples: nobody waits for it, whatever the size."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(NUM_SAMPLES):
            file.seek(i * max(size - SAMPLE_BYTES, 0) // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
