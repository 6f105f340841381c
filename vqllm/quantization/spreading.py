"""How processes that quantize one model share its linears out.

    q       rows 0-319 ──► process 0      it is more than a process's part of all, so all round some
            rows 320-575 ─► process 1     of its rows, where the rule rounds each row by itself
    k, v    one each

Whoever has a linear fits, rounds and packs it; then all have the packed tensors. The rows of a
linear are rounded with the same sums wherever they are, so the result is that of one process.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vqllm.calibration.hessian import InputGroup
from vqllm.calibration.shares import spread
from vqllm.checkpoint.packed_matrix import PackedMatrix
from vqllm.core.distributed import Processes
from vqllm.core.protocols import Codec, OutlierCodec, Rounding, State
from vqllm.recipes import Recipe

ROWS = 64
"""Rows that stay together at least: products of fewer may be other sums, and gain little."""
SLACK = 1.05
"""A linear that costs no more than this times a process's part of all stays whole."""


@dataclass(frozen=True)
class Spread:
    """Who quantizes which linears of some input groups.

    Attributes:
        owners: ranks by full name.
        by_rows: of them, those whose rows are rounded by all; the owner's result counts.
    """

    processes: Processes = field(default_factory=Processes)
    owners: Mapping[str, int] = field(default_factory=dict)
    by_rows: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        groups: Sequence[InputGroup],
        shapes: Mapping[str, tuple[int, int]],
        recipes: Mapping[str, Recipe],
        processes: Processes,
    ) -> "Spread":
        """Args:
        shapes: rows and columns of the groups' linears.
        recipes: theirs.
        """
        if processes.size == 1:
            return cls()
        costs = {name: rows * cols for name, (rows, cols) in shapes.items()}
        most = SLACK * sum(costs.values()) / processes.size
        by_rows = {
            name
            for name, (rows, _) in shapes.items()
            if costs[name] > most and _rows_are_apart(recipes[name]) and rows >= 2 * ROWS
        }
        # The linears of an expert are transformed together.
        items = [
            names
            for group in groups
            for names in ([group.names] if group.side else [(name,) for name in group.names])
        ]
        whole = [names for names in items if names[0] not in by_rows]
        found = spread([sum(costs[name] for name in own) for own in whole], processes.size)
        owners = {name: rank for own, rank in zip(whole, found) for name in own}
        return cls(processes, dict.fromkeys(by_rows, 0) | owners, frozenset(by_rows))

    def is_here(self, name: str) -> bool:
        """Whether this process has something to do for a linear."""
        return (
            self.processes.size == 1
            or name in self.by_rows
            or self.owners[name] == self.processes.rank
        )

    def rounders(self, name: str) -> Processes:
        """Those that round a linear together."""
        return self.processes if name in self.by_rows else Processes()

    def gather(self, names: Iterable[str], made: Sequence[PackedMatrix]) -> list[PackedMatrix]:
        """The linears of these names that were quantized somewhere, in order."""
        if self.processes.size == 1:
            return list(made)
        rank = self.processes.rank
        own = {result.name: result for result in made if self.owners[result.name] == rank}
        sent = [replace(result, decoded_RC=None) for result in own.values()]
        found = {q.name: q for results in self.processes.exchange(sent) for q in results} | own
        return [found[name] for name in names if name in found]


def round_rows(
    rounding: Rounding,
    W_RC: Tensor,
    H_CC: Tensor,
    codec: Codec,
    state: State,
    processes: Processes,
) -> tuple[Tensor, State]:
    """What a rule makes of W, each process rounding some of the rows."""
    if processes.size == 1:
        return rounding(W_RC, H_CC, codec, state)
    tile_rows = codec.tile[0]
    ends = _ends(len(W_RC), tile_rows, processes.size)
    start, end = ([0, *ends][processes.rank], ends[processes.rank])
    codes = None
    if start < end:
        rows = slice(start // tile_rows, -(-end // tile_rows))
        own = {key: t[rows] if key in codec.row_state else t for key, t in state.items()}
        codes, _ = rounding(W_RC[start:end], H_CC, codec, own)
    found = processes.exchange(codes)
    return torch.cat([codes_IJM for codes_IJM in found if codes_IJM is not None]), state


def _ends(num_rows: int, tile_rows: int, size: int) -> list[int]:
    """Where the rows of each process end: after whole tiles, at least `ROWS` rows."""
    step = -(-ROWS // tile_rows) * tile_rows
    num = -(-num_rows // step)
    return [min(num_rows, -(-num * (rank + 1) // size) * step) for rank in range(size)]


def _rows_are_apart(recipe: Recipe) -> bool:
    """Whether the rule rounds each row of tiles by itself, with what the codec has learned before
    and does not change."""
    codec, rounding = recipe.codec, recipe.rounding
    return rounding.rows_apart and codec.refit_cols is None and not isinstance(codec, OutlierCodec)
