"""What a pass with gradients hands to those that look at its linears, and keeps of their findings.

GradientPass ─► Calls ─► Visitor.part_of ─► (the process that the linear belongs to) ─► add
                                                                 finish ─► Record.finish
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from vqllm.calibration.layer_calls import States
from vqllm.calibration.shares import spread
from vqllm.core.distributed import Processes

Findings = dict[str, Tensor]
"""The result of a visitor for the linears of a layer, by full name."""


class Record(Protocol):
    """Stores the findings, and how far the pass has come."""

    def last(self) -> tuple[int, States | None] | None:
        """The layer that was finished last, in an earlier run if there was one, and the gradient in
        its input; None if none was."""
        ...

    def finish(self, index: int, found: Mapping[str, Findings], gradient: States | None) -> None:
        """Layer `index` is done.

        Args:
            found: the findings of the visitors, by their names.
            gradient: in the input of that layer, a tensor for each of its tensors of floating
                point; None for layer 0, which ends the pass.
        """
        ...


class KeptFindings:
    """The record of a pass that is never stopped: what the visitors found, in memory.

    Attributes:
        found: by the name of the visitor, of the linears of all layers.
    """

    def __init__(self) -> None:
        self.found: dict[str, Findings] = {}

    def last(self) -> None:
        """No earlier run."""

    def finish(self, index: int, found: Mapping[str, Findings], gradient: States | None) -> None:
        """Keep the findings."""
        for kind, own in found.items():
            self.found.setdefault(kind, {}).update(own)


class Visitor:
    """Receives inputs and gradients of all linears, layer by layer, the last layer first.

    Several processes run some of the sequences each. A linear belongs to one of them, which adds up
    what all have seen of it; where `is_local`, all add up what they have seen themselves.
    """

    is_local = False

    def begin(self, linears: Mapping[str, nn.Linear]) -> None:
        """A layer comes next, with these linears by full name, as the model stores them."""

    def share(self, roles: Mapping[str, str]) -> None:
        """The layer that comes next has experts: what their linears have in common by full name,
        for a visitor that cannot keep something large for each of them."""

    def keep(self, names: Collection[str]) -> None:
        """Of the layer that has begun, these linears are those of this process."""

    def cost(self, linear: nn.Linear) -> float:
        """What a linear costs its process, in multiplications."""
        return 0.0

    def part_of(self, name: str, rows: slice, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """What `add` needs of a call of a linear; arguments as of `visit`."""
        return ()

    def add(self, name: str, part: tuple[Tensor, ...]) -> None:
        """Add up what `part_of` gave."""

    def visit(self, name: str, rows: slice, x: Tensor, g: Tensor) -> None:
        """A call of a linear.

        Args:
            name: its full name.
            rows: the sequences of the batch.
            x, g: its input [.., C] and the gradients in its outputs, [.., R]; where both have the
                leading axes [S, L], they are those of the batch.
        """
        self.add(name, self.part_of(name, rows, x, g))

    def finish(self) -> Findings:
        """The findings of the layer, after all its batches."""
        return {}


class Calls:
    """The calls of a layer's linears, on their way to those that add them up."""

    def __init__(
        self,
        visitors: Sequence[Visitor],
        linears: Mapping[str, nn.Linear],
        roles: Mapping[str, str],
        processes: Processes,
    ) -> None:
        """Args:
        visitors: for which the layer has begun.
        roles: of linears of experts. Those of one role may be added up together.
        """
        self._visitors, self._processes = visitors, processes
        costs: dict[str, float] = {}
        for name, linear in linears.items():
            key = roles.get(name, name)
            costs[key] = costs.get(key, 0.0) + sum(visitor.cost(linear) for visitor in visitors)
        ranks = dict(zip(costs, spread([*costs.values()], processes.size)))
        self._owners = {name: ranks[roles.get(name, name)] for name in linears}
        for visitor in visitors:
            visitor.keep([name for name, rank in self._owners.items() if rank == processes.rank])
        self._new()

    def add(self, name: str, rows: slice, x: Tensor, g: Tensor) -> None:
        """A call, as of `Visitor.visit`."""
        if self._processes.size == 1:
            for visitor in self._visitors:
                visitor.visit(name, rows, x, g)
            return
        parts = []
        for visitor in self._visitors:
            if visitor.is_local:
                visitor.visit(name, rows, x, g)
            else:  # copies, since what goes backward next may write into this memory
                part = visitor.part_of(name, rows, x, g)
                parts.append(tuple(tensor.clone() for tensor in part))
        self._outgoing[self._owners[name]].append((name, parts))

    def deliver(self) -> None:
        """Let those that add them up have the calls so far."""
        if self._processes.size == 1:
            return
        adding = [visitor for visitor in self._visitors if not visitor.is_local]
        for calls in self._processes.deliver(self._outgoing):
            for name, parts in calls:
                for visitor, part in zip(adding, parts):
                    visitor.add(name, part)
        self._new()

    def _new(self) -> None:
        self._outgoing: list[list[tuple[str, list[tuple[Tensor, ...]]]]] = [
            [] for _ in range(self._processes.size)
        ]
