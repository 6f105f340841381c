"""What the original predicts for a fixed set of sequences, without running its layers again.

    once         layer 0 → 1 → … → n − 1 over all sequences
    each time    what the last layer gave, from a file → the model's own norm, head and the rest

Stored are 2 D bytes a token for D features in a 16-bit dtype: 1.2 KB in the demo model, whose
logits would be 98 KB. Whatever follows the layers (norms, caps, scales) is applied by the model
itself, so that the logits are its own.

`StoredStates` is the storage. Two classes fill it, because the original runs in two ways:

- `StreamedPredictions`, for tuning: a layer in memory at a time, over all sequences before the
  first one is asked for, shared by several processes.
- `RecordedPredictions`, for a comparison: the model is in memory, and a sequence runs when it is
  first asked for, so that its logits can be compared with those from the file, bit by bit.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vqllm.calibration.activation_store import ActivationStore, BesideStore
from vqllm.calibration.layer_calls import States
from vqllm.calibration.layer_stream import LayerStream
from vqllm.calibration.layers import Layers
from vqllm.calibration.passes import batches
from vqllm.checkpoint import atomic
from vqllm.core.distributed import Processes
from vqllm.core.protocols import JSON
from vqllm.errors import CheckpointError, ModelError, NumericalError
from vqllm.hf.decoder_layers import layer_names

logger = logging.getLogger(__name__)


def windows_name(tokens_SL: Tensor) -> str:
    """A name for the files of these sequences: by their contents, since a run that goes on may be
    measured on others."""
    return f"windows-{hashlib.sha256(tokens_SL.numpy().tobytes()).hexdigest()[:16]}"


class StoredStates:
    """What the last layer gives for some sequences, in a folder that all processes see.

    NAME-RANK.bin   hidden states of the sequences of one process, [S, ..], without a header
    NAME.json       what is needed to read them, written when all of them are there
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        tokens_SL: Tensor,
        dtype: torch.dtype,
        processes: Processes | None = None,
    ) -> None:
        """Args:
        tokens_SL: int64, the sequences. Process r of n has r, r + n, r + 2 n, ...
        dtype: of the states.
        """
        self.own_tokens_SL = (processes or Processes()).own(tokens_SL)
        self._folder, self._name, self._dtype = folder, name, dtype
        self._processes = processes or Processes()
        self._num = len(tokens_SL)
        self._places = {_key(tokens_L): place for place, tokens_L in enumerate(tokens_SL)}
        self._stores: dict[int, ActivationStore] = {}
        self._shape: list[int] = []
        """of the states of a sequence"""

    def find(self) -> list[JSON] | None:
        """Open what an earlier run completed; what layers return (`Layers.returned`), or None if
        there is nothing that is whole."""
        record = self._processes.broadcast(self._read_record)
        return None if record is None else self._open(record)

    def create(self, states: Tensor) -> None:
        """Begin the file of this process, for states like these [S, ..]. OutOfSpaceError where
        those of all would not fit."""
        self._shape = list(states.shape[1:])
        sizes = [self._num_bytes(rank, self._shape) for rank in self._ranks()]
        atomic.check_space(self._folder, sum(sizes))
        self._stores[self._processes.rank] = self._store(self._processes.rank, self._shape)

    def write(self, rows: slice, states: Tensor) -> None:
        """The states [S, ..] of some of `own_tokens_SL`."""
        self._stores[self._processes.rank].write(rows, states)

    def read_own(self, rows: slice, device: torch.device) -> Tensor:
        """What `write` was given."""
        return self._stores[self._processes.rank].read(rows, device)

    def beside(self) -> BesideStore:
        """For what layers need beside the states, until all layers have run."""
        return BesideStore(len(self.own_tokens_SL), 0, self._path(self._processes.rank))

    def complete(self, returned: list[JSON]) -> list[JSON]:
        """All states are written, in all processes; what the layers of the first one return.

        Raises:
            CheckpointError: a process of another machine does not see the folder.
        """
        own = self._path(self._processes.rank)
        if own.is_file():
            with own.open("rb") as file:
                os.fsync(file.fileno())  # before the record says that it is there
        self._processes.wait()

        def save() -> JSON:
            record = {"shape": self._shape, "returned": returned}
            atomic.write_bytes(self._record_path, json.dumps(record).encode(), self._folder)
            return record

        return self._open(self._processes.broadcast(save))

    @property
    def places(self) -> set[int]:
        """Numbers of the sequences; of equal ones, that of one of them."""
        return set(self._places.values())

    @property
    def is_created(self) -> bool:
        """Whether there is a file to write to."""
        return bool(self._stores)

    def place(self, tokens_L: Tensor) -> int | None:
        """The number of a sequence; None if it is not one of these."""
        return self._places.get(_key(tokens_L))

    def read(self, tokens_SL: Tensor, device: torch.device) -> Tensor:
        """The states [S, ..] of some of the sequences, when all are complete.

        Raises:
            ModelError: one of them is none of these.
        """
        states = []
        for tokens_L in tokens_SL.cpu():
            place = self.place(tokens_L)
            if place is None:
                raise ModelError("the original is asked for a sequence that it has not seen")
            row, rank = divmod(place, self._processes.size)
            states.append(self._stores[rank].read(slice(row, row + 1), device))
        return torch.cat(states)

    @property
    def _record_path(self) -> Path:
        return self._folder / f"{self._name}.json"

    def _read_record(self) -> JSON | None:
        """What is needed to read the states of an earlier run, as the first process finds it."""
        try:
            record = json.loads(self._record_path.read_bytes())
        except (OSError, ValueError):
            return None
        return record if self._is_whole(record) else None

    def _open(self, record: JSON) -> list[JSON]:
        if not self._is_whole(record):
            raise CheckpointError(
                f"process {self._processes.rank} does not see all states of the original in "
                f"{self._folder}. On several machines the output folder must be one that all of "
                "them share; or keep the original in memory: --set teacher=live"
            )
        self._stores = {rank: self._store(rank, record["shape"]) for rank in self._ranks()}
        return record["returned"]

    def _ranks(self) -> range:
        """Of the processes that have sequences."""
        return range(min(self._processes.size, self._num))

    def _num_own(self, rank: int) -> int:
        return len(range(rank, self._num, self._processes.size))

    def _num_bytes(self, rank: int, shape: list[int]) -> int:
        return self._num_own(rank) * math.prod(shape) * self._dtype.itemsize

    def _path(self, rank: int) -> Path:
        return self._folder / f"{self._name}-{rank}.bin"

    def _store(self, rank: int, shape: list[int]) -> ActivationStore:
        return ActivationStore((self._num_own(rank), *shape), self._dtype, 0, self._path(rank))

    def _is_whole(self, record: JSON) -> bool:
        if "shape" not in record:  # an earlier version wrote it
            return False
        sizes = {self._path(r): self._num_bytes(r, record["shape"]) for r in self._ranks()}
        return all(p.is_file() and p.stat().st_size == size for p, size in sizes.items())


class StreamedPredictions:
    """Predicts as the model does, for sequences that it has run. Only what is outside its layers
    stays in memory.

    Each process runs and stores its share of the sequences, and reads those of all.

    Attributes:
        config, device: of the model.
    """

    def __init__(
        self,
        open_stream: Callable[[], LayerStream],
        tokens_SL: Tensor,
        folder: Path,
        processes: Processes,
        report_progress: Callable[[float], None] = lambda done: None,
        name: str = "teacher",
    ) -> None:
        """Run the model, unless its states are there.

        Args:
            open_stream: opens the model, in the dtype in which it is to predict.
            tokens_SL: int64, all sequences that will be asked for.
            folder: of what only the run needs, the same in all processes.
            report_progress: is called with the share that is done, from 0 to 1.
            name: of the files.

        Raises:
            CheckpointError: a process of another machine does not see the folder.
            NumericalError: the model gives something that is not finite.
            OutOfSpaceError: the states do not fit on the disk.
        """
        self._stream = open_stream()
        self.config, self.device = self._stream.model.config, self._stream.device
        dtype = self._stream.compute_dtype
        self._states = StoredStates(folder, name, tokens_SL, dtype, processes)
        returned = self._states.find()
        if returned is None:
            self._run(report_progress)
            returned = self._states.complete(self._stream.returned)
        self._stream.returned = returned

    def __call__(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Its `logits` [S, L, V] for some of the sequences, as the model itself gives them.

        Raises:
            ModelError: one of them was not among those that it has run.
        """
        states = self._states.read(input_ids, self.device)
        return SimpleNamespace(logits=self._stream.after(input_ids, states))

    def _run(self, report_progress: Callable[[float], None]) -> None:
        """Store the outputs of the last layer for the sequences of this process."""
        stream, own_SL = self._stream, self._states.own_tokens_SL
        beside = self._states.beside()
        for index in range(len(stream)) if len(own_SL) else ():
            with stream.ready(index):
                for number, rows in enumerate(batches(own_SL, stream.device)):
                    # The states of a batch take the place of those that the layer was given.
                    given = None
                    if index > 0:
                        hidden = self._states.read_own(rows, self.device)
                        given = States(hidden, beside.read(rows, self.device))
                    output = stream.run(index, own_SL[rows], given)
                    assert output is not None, "no hook ends this pass early"
                    if not bool(output.hidden.isfinite().all()):
                        raise NumericalError(
                            f"the output of {stream.names[index]} of the original is not finite "
                            f"in {stream.compute_dtype}: its files are damaged, or the dtype is "
                            "too narrow for this model"
                        )
                    if index == number == 0:
                        self._states.create(output.hidden)
                    self._states.write(rows, output.hidden)
                    beside.write(rows, output.beside)
                beside.turn()
            report_progress((index + 1) / len(stream))
        beside.close()


class RecordedPredictions:
    """A model in memory whose layers run once for each of some sequences, in this run or in an
    earlier one with the same folder. What is asked for beside them always runs; so does
    everything where logits do not follow from what the last layer gives.

    24 windows of 2048 tokens of the demo model take 57 MB; their logits would be 4.8 GB.

    Attributes:
        config, device: of the model.
    """

    def __init__(self, model: Any, tokens_SL: Tensor, folder: Path) -> None:
        """Args:
        model: a loaded transformers model.
        tokens_SL: int64, the sequences that will be asked for.
        folder: for the files; it is made when there is something to store.
        """
        self._model = model
        self.config, self.device = model.config, model.device
        self._layers = Layers(model, layer_names(model), model.device)
        self._folder = folder
        self._states = StoredStates(folder, windows_name(tokens_SL), tokens_SL, model.dtype)
        self._missing = self._states.places
        """numbers of the sequences that are still to run"""
        self._may_store = True
        if returned := self._states.find():
            self._layers.returned, self._missing = returned, set()

    def __call__(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """The output for one sequence, [1, L]; its `logits` are those of the model itself."""
        place = self._states.place(input_ids[0].cpu())
        if place is None or not self._may_store:
            return self._model(input_ids=input_ids, use_cache=use_cache)
        if place in self._missing:
            return SimpleNamespace(logits=self._run(place, input_ids))
        states = self._states.read(input_ids, self.device)
        return SimpleNamespace(logits=self._layers.after(input_ids, states))

    def _run(self, place: int, input_ids: Tensor) -> Tensor:
        """The logits of a sequence, whose states are stored."""
        logits, states = self._layers.run_all(input_ids)
        row = slice(place, place + 1)
        # From what was given to the file, and cast to its dtype, the same must follow.
        stored = states.to(self._model.dtype)
        if not torch.equal(self._layers.after(input_ids, stored), logits):
            logger.info(
                "the original model is run for every member: its logits do not follow from what "
                "its last layer gives"
            )
            self._may_store = False
            return logits
        if not self._states.is_created:
            atomic.make_folder(self._folder)
            self._states.create(states)
        self._states.write(row, stored)
        self._missing.discard(place)
        if not self._missing:
            self._states.complete(self._layers.returned)
        return logits


def _key(tokens_L: Tensor) -> bytes:
    return tokens_L.numpy().tobytes()
