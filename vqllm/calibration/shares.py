"""What each process does of a calibration that several share.

    sequences    unit 0  1  2  3  4  5 …     unit u belongs to process u mod P: whole batches, those
    process        0  1  2  0  1  2 …         that one process alone would run

A round is the next unit of every process. Its batches come together in the order in which one
process would run them, and each process adds them to the parts of the sums that are its own
(`linalg.symmetric_blocks`). So every sum has the same terms in the same order, however many
processes there are, and is the same to the last bit.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vqllm.calibration.hessian import InputHessian
from vqllm.core import linalg
from vqllm.core.distributed import Processes


@dataclass(frozen=True)
class Share:
    """The sequences of one process.

    Attributes:
        unit: sequences that belong to one process together; whole batches.
        holds_all: whether every process has the states of all sequences, though it computes only
            its own.
    """

    processes: Processes = field(default_factory=Processes)
    unit: int = 1
    holds_all: bool = False

    def is_own(self, rows: slice) -> bool:
        """Whether this process runs a batch."""
        return rows.start // self.unit % self.processes.size == self.processes.rank

    def rounds(self, batches: Iterable[slice]) -> Iterator[list[slice]]:
        """Its batches of each round, which may be none; those of one process come one by one."""
        batches, size = list(batches), self.processes.size
        if size == 1:
            yield from ([rows] for rows in batches)
            return
        num = batches[-1].start // (self.unit * size) + 1 if batches else 0
        for number in range(num):
            unit = number * size + self.processes.rank
            yield [rows for rows in batches if rows.start // self.unit == unit]

    def num_held(self, num_sequences: int) -> int:
        """Sequences whose states this process has."""
        if self.holds_all or self.processes.size == 1:
            return num_sequences
        starts = range(0, num_sequences, self.unit)
        own = starts[self.processes.rank :: self.processes.size]
        return sum(min(self.unit, num_sequences - start) for start in own)

    def held(self, rows: slice) -> slice:
        """Where the states of a batch are among those of this process."""
        if self.holds_all or self.processes.size == 1:
            return rows
        unit, within = divmod(rows.start, self.unit)
        start = unit // self.processes.size * self.unit + within
        return slice(start, start + rows.stop - rows.start)


def spread(costs: Sequence[float], num: int) -> list[int]:
    """For each item the process that does it: the most costly ones first, each to the one that has
    least to do so far."""
    loads, owners = [0.0] * num, [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[item] = loads.index(min(loads))
        loads[owners[item]] += costs[item]
    return owners


def share_sums(hessians: Sequence[InputHessian], processes: Processes) -> None:
    """Say of each Hessian which parts this process adds up."""
    if processes.size == 1:
        return
    parts = [part for hessian in hessians for part in _parts(hessian)]
    owners = iter(spread([cost for _, cost in parts], processes.size))
    for hessian in hessians:
        own = {name for name, _ in _parts(hessian) if next(owners) == processes.rank}
        hessian.blocks = frozenset(name for name in own if isinstance(name, int))
        if hessian.drift is not None:
            hessian.drift.parts = frozenset(name for name in own if isinstance(name, str))


def gather_sums(hessians: Sequence[InputHessian], processes: Processes) -> None:
    """Let every process have all parts."""
    if processes.size == 1:
        return
    own = [_strips(hessian, hessian.blocks or ()) for hessian in hessians]
    drifts = [_own_sums(hessian) for hessian in hessians]
    for found, others in processes.exchange((own, drifts)):
        for hessian, strips, sums in zip(hessians, found, others):
            blocks = linalg.symmetric_blocks(len(hessian.total_CC))
            for number, strip in strips.items():
                rows = blocks[number]
                hessian.total_CC[rows, rows.start :] = strip
            for name, values in sums.items():
                assert hessian.drift is not None, "the same in all processes"
                hessian.drift.sums()[name].copy_(values)
    for hessian in hessians:
        hessian.blocks = None


def _parts(hessian: InputHessian) -> list[tuple[int | str, float]]:
    """The parts that a process can add up alone, each with what a token costs there."""
    size = len(hessian.total_CC)
    blocks = linalg.symmetric_blocks(size)
    parts: list[tuple[int | str, float]] = [
        (number, float(min(rows.stop, size) - rows.start) * (size - rows.start))
        for number, rows in enumerate(blocks)
    ]
    if hessian.drift is not None:
        parts += [(name, float(values.numel())) for name, values in hessian.drift.sums().items()]
    return parts


def _own_sums(hessian: InputHessian) -> dict[str, Tensor]:
    drift = hessian.drift
    return {} if drift is None else {k: v for k, v in drift.sums().items() if k in drift.parts}


def _strips(hessian: InputHessian, numbers: Collection[int]) -> dict[int, Tensor]:
    blocks = linalg.symmetric_blocks(len(hessian.total_CC))
    return {
        number: hessian.total_CC[blocks[number], blocks[number].start :]
        for number in sorted(numbers)
    }
