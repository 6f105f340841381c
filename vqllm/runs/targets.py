"""Runs that aim at a size of the file or at a KL divergence."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from vqllm import recipes
from vqllm.checkpoint.absent_weights import source_tensors
from vqllm.checkpoint.source_files import has_weights
from vqllm.core import json_text
from vqllm.core.distributed import Processes
from vqllm.core.progress import Progress
from vqllm.core.protocols import JSON
from vqllm.errors import RecipeError
from vqllm.forecast.measure import Look, look
from vqllm.forecast.targets import RecipeOf, Targets
from vqllm.models.cache import cache_dir
from vqllm.plan.job import Job
from vqllm.quantization.checks import Checked, check_model, check_selection
from vqllm.recipes import Recipe
from vqllm.report.summary import Summary
from vqllm.runs.arguments import QuantizeArguments

logger = logging.getLogger(__name__)

UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10}
UNITS |= {"Mi": 2**20, "Gi": 2**30}
TOLERANCE = 0.15
"""Relative, of a KL divergence."""


def checked_model(job: Job) -> Checked:
    """The model of a job, of which only config.json need be there. Errors as of `check_model`."""
    if has_weights(job.source):
        return check_model(job.source, job.model, job.recipe, job.trust_remote_code)
    tensors = source_tensors(job.source, job.trust_remote_code)
    return check_selection(tensors, job.model, job.recipe)


class Aim:
    """A target, and the recipe that is to hit it.

    `job` is one of any recipe of the preset; `recipe_of` makes others.
    """

    def __init__(
        self,
        given: QuantizeArguments,
        job: Job,
        recipe_of: RecipeOf,
        progress: Progress,
        may_measure: bool = True,
        processes: Processes | None = None,
    ) -> None:
        """Args:
        processes: those that share the run; the first of them decides for all.
        """
        self.given = given
        self.processes = processes or Processes()
        self._job, self._recipe_of, self._progress = job, recipe_of, progress
        self._may_measure = may_measure
        self._size = None if given.size is None else bytes_of(given.size)
        if given.kl is not None and not given.kl > 0:
            raise RecipeError(f"--kl {given.kl}: a divergence above 0 is needed, such as 0.1.")

    @cached_property
    def seen(self) -> Look | None:
        """What was measured for it."""
        if not self._may_measure:
            return None
        return look(self._job, checked_model(self._job), self._progress)

    def recipe(self, correction: float = 1.0) -> Recipe:
        """The recipe. RecipeError for a target out of reach, with what can be reached.

        Args:
            correction: of a KL divergence: what was measured over what was expected.
        """

        def found() -> tuple[JSON, str]:
            recipe = self._recipe(correction)
            return recipe.to_dict(), recipe.name

        return recipes.from_dict(*self.processes.broadcast(found))

    def _recipe(self, correction: float) -> Recipe:
        found = self.seen.found if self.seen else None
        preset = self.given.preset or "balanced"
        checked = checked_model(self._job)
        targets = Targets(self._job, checked, found, preset, self._recipe_of)
        if self._size is not None:
            return targets.for_size(self._size)
        assert self.given.kl is not None, "there is a target"
        if found is None:
            raise RecipeError(
                "--kl: what errors cost could not be measured on this model. Give a number of bits "
                "or a size."
            )
        return targets.for_kl(self.given.kl, correction)


def bytes_of(size: int | str) -> int:
    """A number of bytes, as a number or a text. RecipeError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*(Ki|Mi|Gi|[kKMG]?)B?\s*", str(size))
    if not match or float(match[1]) <= 0:
        raise RecipeError(f"--size {size!r}: expected bytes such as 60MB, 1.5GB or 57MiB.")
    return int(float(match[1]) * UNITS[match[2]])


def run_to_kl(aim: Aim, run: Callable[[Recipe], Summary | None]) -> Summary | None:
    """Run, and once more with the expectation corrected if the divergence is not what was asked
    for; the first result is deleted then. A run that is stopped goes on. None in all but the first
    of several processes."""
    given, processes = aim.given, aim.processes
    assert given.kl is not None, "asked for"
    note = _Note(given)
    correction = processes.broadcast(note.read)
    summary = run(aim.recipe(correction or 1.0))
    kl = processes.broadcast(lambda: _divergence(summary))
    if kl is None:
        return summary
    is_met = abs(kl / given.kl - 1) <= TOLERANCE
    if is_met or correction is not None:
        if not is_met:
            logger.warning("KL divergence %.4f after a correction, asked for was %g", kl, given.kl)
        processes.on_first(note.forget)
        return summary
    logger.info(
        "KL divergence %.4f, asked for was %g: quantizing once more, with what errors cost "
        "corrected by that",
        *(kl, given.kl),
    )
    correction = kl / given.kl
    recipe = aim.recipe(correction)  # a target out of reach keeps the first result

    def begin_anew() -> None:
        note.write(correction)
        shutil.rmtree(given.output)

    processes.on_first(begin_anew)
    summary = run(recipe)
    processes.on_first(note.forget)
    return summary


def _divergence(summary: Summary | None) -> float | None:
    """What was measured; None if nothing was."""
    if summary is None or summary.evaluation is None:
        return None
    return summary.evaluation["kl"]


class _Note:
    """The correction of a run in the user's cache, for the same command after it was stopped."""

    def __init__(self, given: QuantizeArguments) -> None:
        place = os.fsencode(Path(given.output).absolute()), str(given.model), given.kl
        digest = hashlib.sha256(repr(place).encode()).hexdigest()
        self._path = cache_dir() / "targets" / f"{digest}.json"

    def read(self) -> float | None:
        try:
            return float(json_text.read(self._path)["correction"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, correction: float) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({"correction": correction}), encoding="utf-8")

    def forget(self) -> None:
        self._path.unlink(missing_ok=True)
