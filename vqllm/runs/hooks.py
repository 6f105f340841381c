"""Where whoever starts a run takes part in it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from vqllm.checkpoint.resume.run_folder import RunFolder
from vqllm.core.protocols import JSON
from vqllm.recipes import Recipe, TuningRecipe
from vqllm.report.summary import Summary

MakeSequences = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """Called at three moments of a run, by its first process; by default nothing is."""

    prepare: Callable[[RunFolder, Recipe | TuningRecipe, MakeSequences], None] = lambda *_: None
    """before anything is computed: is given the open folder, the recipe, and what makes the
    calibration sequences; once for each folder of a run"""
    measure: Callable[[Tensor], JSON] | None = None
    """in place of the measurement of the result: is given the held-out sequences, and returns what
    `evaluation.compare` does"""
    finish: Callable[[Summary], None] = lambda _: None
    """before the folder is closed; until it returns, the run is unfinished"""
