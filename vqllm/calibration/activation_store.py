"""Hidden states of all calibration sequences, in memory or, past a budget, in a mapped file."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vqllm.calibration.layer_calls import States


class ActivationStore:
    """A tensor whose first axis is that of the sequences, read and written batch by batch.

    Within `budget_bytes` it is in memory. Beyond, it is a memory-mapped file at `path`: the
    operating system writes its pages to disk and frees them when memory is short. `close` removes
    the file.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, budget_bytes: int, path: Path
    ) -> None:
        numel = math.prod(shape)
        self.path: Path | None = None
        if numel * dtype.itemsize <= budget_bytes:
            self._states = torch.empty(shape, dtype=dtype)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.path = path
            self._states = torch.from_file(str(path), shared=True, size=numel, dtype=dtype).view(
                shape
            )

    def read(self, rows: slice | Tensor, device: torch.device) -> Tensor:
        """The states of some sequences, a range or int64 [N], on `device`."""
        return self._states[rows].to(device)

    def write(self, rows: slice, states: Tensor) -> None:
        """Replace the states of some sequences."""
        self._states[rows] = states.to(self._states.device)

    def close(self) -> None:
        """Free the memory, and the file if there is one."""
        self._states = torch.empty(0)
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class BesideStore:
    """The tensors of all sequences that layers need beside the hidden states, by name.

    What is written is read after the next `turn`, until then what was there before: the tensors
    that one layer is given and those that it gives may have different names. Those that exceed
    `budget_bytes` are in files whose names begin with that of `path`.
    """

    def __init__(self, num_sequences: int, budget_bytes: int, path: Path) -> None:
        self._num_sequences = num_sequences
        self._left = budget_bytes
        self._path = path
        self._stores: dict[str, ActivationStore] = {}
        self._readable: frozenset[str] = frozenset()
        self._written: set[str] = set()
        self._num_made = 0

    def read(self, rows: slice | Tensor, device: torch.device) -> dict[str, Tensor]:
        """The tensors of some sequences, on `device`."""
        return {name: self._stores[name].read(rows, device) for name in sorted(self._readable)}

    def write(self, rows: slice, beside: Mapping[str, Tensor]) -> None:
        """Replace the tensors of some sequences."""
        for name, values in beside.items():
            if name not in self._stores:
                self._stores[name] = self._new(values)
            self._stores[name].write(rows, values)
            self._written.add(name)

    def turn(self) -> None:
        """All sequences are written."""
        for name in self._stores.keys() - self._written:
            self._stores.pop(name).close()
        self._readable, self._written = frozenset(self._written), set()

    def close(self) -> None:
        """Free the memory and the files."""
        for store in self._stores.values():
            store.close()
        self._stores, self._readable = {}, frozenset()

    def _new(self, values: Tensor) -> ActivationStore:
        shape = (self._num_sequences, *values.shape[1:])
        self._num_made += 1
        path = self._path.with_name(f"{self._path.stem}-beside-{self._num_made}.bin")
        store = ActivationStore(shape, values.dtype, self._left, path)
        if store.path is None:
            self._left -= math.prod(shape) * values.dtype.itemsize
        return store


class StatesStore:
    """`States` of all sequences: the hidden ones at `path` where they exceed the budget."""

    def __init__(self, num_sequences: int, like: States, budget_bytes: int, path: Path) -> None:
        """Args:
        like: the states of some sequences.
        """
        hidden = like.hidden
        shape = (num_sequences, *hidden.shape[1:])
        self._hidden = ActivationStore(shape, hidden.dtype, budget_bytes, path)
        if self._hidden.path is None:
            budget_bytes -= math.prod(shape) * hidden.dtype.itemsize
        self._beside = BesideStore(num_sequences, budget_bytes, path)

    def read(self, rows: slice | Tensor, device: torch.device) -> States:
        """The states of some sequences, a range or int64 [N], on `device`."""
        return States(self._hidden.read(rows, device), self._beside.read(rows, device))

    def write(self, rows: slice, states: States) -> None:
        """Replace the states of some sequences."""
        self._hidden.write(rows, states.hidden)
        self._beside.write(rows, states.beside)

    def turn(self) -> None:
        """All sequences are written; what was beside their old states is freed."""
        self._beside.turn()

    def close(self) -> None:
        """Free the memory and the files."""
        self._hidden.close()
        self._beside.close()
