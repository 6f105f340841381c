"""The output folder of a quantization that several processes share.

Only the first process reads and writes it, and what it reads goes to all. So the folder need not be
one that all machines see, and a run that was stopped goes on with any number of processes.
"""

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from vqllm.checkpoint.file_names import FileNames
from vqllm.checkpoint.format import JSON
from vqllm.checkpoint.packed_matrix import PackedMatrix
from vqllm.checkpoint.resume.journal import WORK
from vqllm.checkpoint.resume.layer_writer import LayerWriter
from vqllm.checkpoint.source import SourceTensors
from vqllm.core.distributed import Processes
from vqllm_kernels.linear import LinearSpec

OWN = "process-"
"""Begins the name of the folder in WORK for what another process than the first keeps there."""


class SharedRun:
    """What the loop over the layers needs of the folder, in every process.

    Methods are called by all processes at the same place.

    Attributes:
        processes: those that share the run.
        scratch: a folder for temporary files of this process.
        num_finished: layers that need not be done again.
    """

    def __init__(self, folder: LayerWriter | None, processes: Processes, scratch: Path) -> None:
        """Args:
        folder: of the run, in the first process only.
        """
        self._folder, self.processes, self.scratch = folder, processes, scratch
        self.num_finished: int = processes.broadcast(lambda: self._first.num_finished)

    @property
    def _first(self) -> LayerWriter:
        assert self._folder is not None, "asked in the first process"
        return self._folder

    def load_or_make(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors that the first process makes, once a run, and reads back when it goes on."""
        return self.processes.broadcast(lambda: self._first.load_or_make(name, make))

    def load(self, name: str) -> dict[str, Tensor] | None:
        """What `save` wrote; None if there is nothing, or it is damaged."""
        return self.processes.broadcast(lambda: self._first.load(name))

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Store tensors of the first process."""
        if self._folder is not None:
            self._folder.save(name, tensors)

    def load_packed(self, name: str) -> PackedMatrix | None:
        """What `save_packed` wrote; None if there is nothing, or it is damaged."""
        return self.processes.broadcast(lambda: self._first.load_packed(name))

    def save_packed(self, name: str, made: PackedMatrix) -> PackedMatrix:
        """Store a quantized matrix until the run is finished; returns it as read from the file."""
        return self.processes.broadcast(lambda: self._first.save_packed(name, made))

    def begin(
        self,
        tensors: SourceTensors,
        layer_names: list[str],
        planned: Mapping[str, LinearSpec],
        tied: Collection[str] = (),
    ) -> None:
        """As of `LayerWriter`."""
        self._tensors = tensors
        self._names = FileNames(tensors.blueprint, planned)
        self.processes.on_first(lambda: self._first.begin(tensors, layer_names, planned, tied))

    def read_rows(self, module: str, start: int, stop: int) -> Tensor:
        """Rows of the weight of a module of the source model, as stored."""
        return self._tensors.read_rows(f"{module}.weight", start, stop)

    def stores(self, module: str) -> bool:
        """Whether the source model has a weight under the name of this module."""
        return f"{module}.weight" in self._tensors

    def has(self, name: str) -> bool:
        """Whether the source model has a tensor of this full name that can be changed alone."""
        return name in self._tensors and self._names.is_alone(name)

    def write_layer(
        self,
        index: int,
        results: Sequence[PackedMatrix],
        changed: Mapping[str, Tensor] | None = None,
    ) -> None:
        """As of `LayerWriter`, in the first process."""
        if self._folder is not None:
            self._folder.write_layer(index, results, changed)
        self.num_finished = index + 1

    def decoded(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """The dense weights [R, C] of each quantized linear of a finished layer, float32."""
        for name, spec, tensors in self.processes.broadcast(lambda: self._first.packed(index)):
            yield name, spec.dequantize(tensors)

    def vectors(self, index: int, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of a finished layer that are not packed, by full name."""
        return self.processes.broadcast(lambda: self._first.vectors(index, names))

    def records(self, index: int) -> list[JSON]:
        """The report lines of a finished layer; none in other processes than the first."""
        return [] if self._folder is None else self._folder.records(index)

    def all_records(self) -> list[JSON]:
        """The report lines of all finished layers; none in other processes than the first."""
        return [] if self._folder is None else self._folder.all_records()

    def write_in_first(self, write: Callable[[LayerWriter], dict[str, str]]) -> dict[str, str]:
        """What a function that writes into the folder returns, after it has."""
        return self.processes.broadcast(lambda: write(self._first))


@contextmanager
def own_scratch(output: Path, folder: LayerWriter | None, processes: Processes) -> Iterator[Path]:
    """A folder for temporary files of this process, which does not stay.

    That of the first process is the run's own. The others have theirs beside it, on machines that
    do not see the output folder in one of the same name.
    """
    if folder is not None:
        for left in folder.scratch.glob(f"{OWN}*"):  # of processes that were killed
            shutil.rmtree(left, ignore_errors=True)
    processes.wait()
    if folder is not None:
        yield folder.scratch
        return
    own = output / WORK / f"{OWN}{processes.rank}"
    try:
        own.mkdir(parents=True, exist_ok=True)
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)
        for parent in (own.parent, output):
            _remove_empty(parent)


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # something is in it, or it is gone
        return
