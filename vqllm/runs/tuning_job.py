"""What a tuning run is to do, and its folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vqllm.checkpoint.reader import Checkpoint
from vqllm.checkpoint.resume.journal import fingerprint
from vqllm.checkpoint.resume.tuned_writer import TunedWriter
from vqllm.core.distributed import Processes
from vqllm.core.protocols import JSON
from vqllm.errors import CheckpointError, RecipeError
from vqllm.models.resolve import ResolvedModel
from vqllm.quantization.loop import sequences_of
from vqllm.recipes import Stages, TuningRecipe


@dataclass(frozen=True, kw_only=True)
class TuningJob:
    """What to tune, how, against what."""

    checkpoint: Checkpoint
    teacher: ResolvedModel
    recipe: TuningRecipe
    output: Path
    device: torch.device
    trust_remote_code: bool = False
    within: str = ""
    """what stands before the recipe's keys in that of the command"""

    def make_sequences(self) -> dict[str, Tensor]:
        """The training and held-out sequences, int64 [S, L] by name."""
        return sequences_of(self.teacher.path, self.recipe, self.device, self.trust_remote_code)


def check_shard(recipe: Stages, processes: Processes, within: str) -> None:
    """Raise RecipeError where one process is to share a model with others."""
    if recipe.shard and processes.size == 1:
        raise RecipeError(
            f"{within}shard splits a model over several processes, and there is one: start them "
            "with torchrun --nproc-per-node NUMBER -m vqllm tune, or leave the key out."
        )


def open_tuned_run(job: TuningJob, processes: Processes) -> TunedWriter:
    """The output folder, new or with an unfinished run of the same job.

    Raises:
        CheckpointError: something else is there, or it is the checkpoint that is to be tuned.
    """
    if job.output.resolve() == job.checkpoint.folder.resolve():
        raise CheckpointError(
            f"{job.output} is the checkpoint that is to be tuned, which is not changed: choose "
            "another output folder."
        )
    settings = {
        "teacher": job.teacher.name,
        "teacher_files": fingerprint(job.teacher.path),
        "device": job.device.type,
        "processes": processes.size,
    }
    return TunedWriter(job.output, job.checkpoint, _identity(job.recipe), settings)


def _identity(recipe: TuningRecipe) -> JSON:
    """The recipe, as far as a run that goes on must have the same: how many sequences run together,
    what is computed again and whether the original stays in memory change the order of sums at
    most, and are what to change where memory ended."""
    values = recipe.to_dict()
    del values["teacher"], values["shard"]
    for stage in values["stages"]:
        stage.pop("together", None)
        stage.pop("checkpointing", None)
    return values
