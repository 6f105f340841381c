"""What the original predicts for a fixed set of sequences, without the original in memory.

    once         layer 0 → 1 → … → n − 1 over all sequences, one layer in memory at a time
    each time    what the last layer gave, from a file → the model's own norm, head and the rest

Stored are 2 D bytes a token for D features in a 16-bit dtype: 1.2 KB in the demo model, whose
logits would be 98 KB.
"""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from vqllm.calibration.activation_store import ActivationStore
from vqllm.calibration.layer_stream import LayerStream
from vqllm.calibration.passes import batches
from vqllm.checkpoint import atomic
from vqllm.checkpoint.resume.run_folder import RunFolder
from vqllm.core.distributed import Processes
from vqllm.core.protocols import JSON
from vqllm.errors import CheckpointError, ModelError, NumericalError


class CachedTeacher:
    """Predicts as the model does, for sequences that it has seen.

    Each process runs and stores its share of the sequences, and reads those of all. The files are
    those of a run: they are found again when it goes on, and go when it is over.

    Attributes:
        config, device: of the model.
    """

    def __init__(
        self,
        open_stream: Callable[[Path], LayerStream],
        tokens_SL: Tensor,
        folder: RunFolder | None,
        processes: Processes,
        share: Callable[[float], None] = lambda done: None,
        name: str = "teacher",
    ) -> None:
        """Run the model, unless its states are there.

        Args:
            open_stream: opens the model, in the dtype in which it is to predict; is given a folder
                for what does not fit in memory.
            tokens_SL: int64, all sequences that will be asked for.
            folder: of the run; only the first process has it.
            share: is told how much is done, from 0 to 1.
            name: of the files.

        Raises:
            CheckpointError: a process of another machine does not see the folder.
            NumericalError: the model gives something that is not finite.
            OutOfSpaceError: the states do not fit on the disk.
        """
        self._tokens_SL, self._processes, self._name = tokens_SL, processes, name
        self._places = {_key(tokens): place for place, tokens in enumerate(tokens_SL)}

        def load() -> tuple[Path, tuple[JSON, dict[str, Tensor]] | None]:
            assert folder is not None
            return folder.scratch, folder.load_record(name)

        self._folder, found = processes.broadcast(load)
        self._stream = open_stream(self._folder / f"offload-{processes.rank}")
        self.config, self.device = self._stream.model.config, self._stream.device
        told = found[0] if found and self._is_whole(found[0]) else None
        told = processes.broadcast(lambda: told)
        if told is None:
            own = self._run(share)
            processes.wait()

            def save() -> JSON:
                assert folder is not None
                folder.save_record(name, own, {})
                return own

            told = processes.broadcast(save)
        if not self._is_whole(told):
            raise CheckpointError(
                f"process {processes.rank} does not see all states of the original in "
                f"{self._folder}. On several machines the output folder must be one that all of "
                "them share; or keep the original in memory: --set teacher=live"
            )
        self._stream.returned = told["returned"]
        self._stores = [self._store(rank, told["features"]) for rank in self._ranks()]

    def __call__(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Its `logits` [S, L, V] for some of the sequences, as the model itself gives them.

        Raises:
            ModelError: one of them was not among those that it has seen.
        """
        states = []
        for tokens_L in input_ids.cpu():
            place = self._places.get(_key(tokens_L))
            if place is None:
                raise ModelError("the original is asked for a sequence that it has not seen")
            row, rank = divmod(place, self._processes.size)
            states.append(self._stores[rank].read(slice(row, row + 1), self.device))
        return SimpleNamespace(logits=self._stream.after(input_ids, torch.cat(states)))

    def _run(self, share: Callable[[float], None]) -> JSON:
        """Store the outputs of the last layer for the sequences of this process; what is needed to
        read them."""
        own_SL, stream, store = self._processes.own(self._tokens_SL), self._stream, None
        features = 0
        for index in range(len(stream)) if len(own_SL) else ():
            with stream.layer(index) as layer:
                layer.to(stream.compute_dtype)
                for rows in batches(own_SL, stream.device):
                    states = None if index == 0 or store is None else store.read(rows, self.device)
                    output = stream.run(index, own_SL[rows], states)
                    assert output is not None, "no hook ends this pass early"
                    if not bool(output.isfinite().all()):
                        raise NumericalError(
                            f"the output of {stream.names[index]} of the original is not finite "
                            f"in {stream.compute_dtype}: its files are damaged, or the dtype is "
                            "too narrow for this model"
                        )
                    if store is None:
                        features = output.shape[-1]
                        sizes = [self._num_bytes(rank, features) for rank in self._ranks()]
                        atomic.check_space(self._folder, sum(sizes))
                        store = self._store(self._processes.rank, features)
                    store.write(rows, output)
            share((index + 1) / len(stream))
        if store is not None:
            with self._path(self._processes.rank).open("rb") as file:
                os.fsync(file.fileno())  # before it is told that they are there
        return {"features": features, "returned": stream.returned}

    def _ranks(self) -> range:
        """Of the processes that have sequences."""
        return range(min(self._processes.size, len(self._tokens_SL)))

    def _shape(self, rank: int, features: int) -> tuple[int, int, int]:
        num, length = self._tokens_SL[rank :: self._processes.size].shape
        return num, length, features

    def _num_bytes(self, rank: int, features: int) -> int:
        num, length, _ = self._shape(rank, features)
        return num * length * features * self._stream.compute_dtype.itemsize

    def _path(self, rank: int) -> Path:
        return self._folder / f"{self._name}-{rank}.bin"

    def _store(self, rank: int, features: int) -> ActivationStore:
        dtype = self._stream.compute_dtype
        return ActivationStore(self._shape(rank, features), dtype, 0, self._path(rank))

    def _is_whole(self, told: JSON) -> bool:
        sizes = {rank: self._num_bytes(rank, told["features"]) for rank in self._ranks()}
        files = {rank: self._path(rank) for rank in sizes}
        return all(p.is_file() and p.stat().st_size == sizes[rank] for rank, p in files.items())


def _key(tokens_L: Tensor) -> bytes:
    return tokens_L.numpy().tobytes()
