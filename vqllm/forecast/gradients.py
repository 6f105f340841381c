"""The pass with gradients over few sequences: what errors cost, and how long such a pass takes."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from vqllm.allocation.gradient_statistics import needs_gradients
from vqllm.calibration.gradients import GradientPass
from vqllm.calibration.saliency import OutputHessians, TokenWeights
from vqllm.calibration.visitors import Findings, KeptFindings, Visitor
from vqllm.core import memory
from vqllm.core.progress import Progress
from vqllm.core.protocols import OutputRounding
from vqllm.forecast.ends import EndStatistics
from vqllm.forecast.quality import FewSequences, Losses
from vqllm.plan.job import Job
from vqllm.quantization.checks import Checked


@dataclass(frozen=True)
class PassMeasured:
    """What a pass over few sequences found."""

    losses: Losses
    ends: EndStatistics
    outputs: Findings
    """packed H_O of the layer that is tried, where the rounding rule asks for it"""
    weights: Findings
    """of its tokens, where the recipe has such"""
    seconds_a_token: float
    """of a run's pass: both ways through the model, and what looks at all tokens"""
    seconds_a_sample: float
    """of the tokens that sensitivities are measured on"""
    seconds: float
    """that does not depend on tokens"""
    peak_bytes: int


def measure_gradients(
    job: Job, checked: Checked, tokens: Tensor, index: int, folder: Path, progress: Progress
) -> PassMeasured:
    """Run the pass.

    Args:
        tokens: int64 [S, L].
        index: the layer that will be tried, of `num_layers`.
        folder: for activations.
    """
    recipe = job.recipe
    stream = job.open_stream()
    num_layers, prefix = len(stream), f"{stream.names[index]}."
    del stream
    few = FewSequences(checked.selection, recipe, tokens.numel(), num_layers)
    visitors: dict[str, Timed] = {"loss": Timed(few)}
    if isinstance(recipe.rounding, OutputRounding):
        visitors["outputs"] = Timed(Only(prefix, OutputHessians(recipe.hessian.power)))
    if recipe.hessian.weights == "output":
        visitors["weights"] = Timed(Only(prefix, TokenWeights(tokens, recipe.hessian.power)))
    ends, record = EndStatistics(), KeptFindings()
    opened = 0.0

    def open_stream():
        nonlocal opened
        start = time.perf_counter()
        stream = ends.watch(job.open_stream())
        opened += time.perf_counter() - start
        return stream

    memory.restart_peak()
    start = time.perf_counter()
    run = GradientPass(open_stream, tokens, recipe.seed, job.activation_budget, folder)
    run.run(checked.selection.of, visitors, record, progress.share)
    total = time.perf_counter() - start
    watching = sum(own.visiting + own.finishing for own in visitors.values())
    # Of the layers that are tried alone, every layer of a run has the same.
    own = {name: timed for name, timed in visitors.items() if name != "loss"}
    outputs = sum(timed.visiting for timed in own.values()) * num_layers
    judging = 0.0
    if recipe.allocation is not None:
        judging = visitors["loss"].finishing * few.share_of_one
    wanted = needs_gradients(recipe)
    return PassMeasured(
        losses=few.losses(),
        ends=ends,
        outputs=record.found.get("outputs", {}),
        weights=record.found.get("weights", {}),
        seconds_a_token=wanted * (total - watching - opened + outputs) / tokens.numel(),
        seconds_a_sample=(recipe.allocation is not None)
        * visitors["loss"].visiting
        / tokens.numel(),
        seconds=wanted * (opened + judging + sum(o.finishing for o in own.values()) * num_layers),
        peak_bytes=memory.peak_resident(),
    )


class Timed(Visitor):
    """A visitor, and the seconds that it took for visits and for results."""

    def __init__(self, visitor: Visitor) -> None:
        self._visitor = visitor
        self.visiting = self.finishing = 0.0

    def share(self, roles: Mapping[str, str]) -> None:
        """As the visitor."""
        self._visitor.share(roles)

    def begin(self, linears: Mapping[str, nn.Linear]) -> None:
        """As the visitor."""
        self._visitor.begin(linears)

    def visit(self, name: str, rows: slice, x: Tensor, g: Tensor) -> None:
        """As the visitor."""
        start = time.perf_counter()
        self._visitor.visit(name, rows, x, g)
        self.visiting += time.perf_counter() - start

    def finish(self) -> Findings:
        """As the visitor."""
        start = time.perf_counter()
        found = self._visitor.finish()
        self.finishing += time.perf_counter() - start
        return found


class Only(Visitor):
    """A visitor of a single layer."""

    def __init__(self, prefix: str, visitor: Visitor) -> None:
        self._prefix, self._visitor = prefix, visitor
        self._roles: Mapping[str, str] = {}
        self._is_on = False

    def share(self, roles: Mapping[str, str]) -> None:
        """As the visitor."""
        self._roles = roles

    def begin(self, linears: Mapping[str, nn.Linear]) -> None:
        """As the visitor, if these are linears of the layer."""
        self._is_on = any(name.startswith(self._prefix) for name in linears)
        if self._is_on:
            self._visitor.share(self._roles)
            self._visitor.begin(linears)

    def visit(self, name: str, rows: slice, x: Tensor, g: Tensor) -> None:
        """As the visitor."""
        if self._is_on:
            self._visitor.visit(name, rows, x, g)

    def finish(self) -> Findings:
        """As the visitor."""
        return self._visitor.finish() if self._is_on else {}
