"""Hidden states of all calibration sequences, in memory or, past a budget, in a mapped file."""

from pathlib import Path

import torch
from torch import Tensor


class ActivationStore:
    """A [sequences, length, features] tensor that is read and written batch by batch.

    Within `budget_bytes` it is in memory. Beyond, it is a memory-mapped file at `path`: the
    operating system writes its pages to disk and frees them when memory is short. `close` removes
    the file.
    """

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, budget_bytes: int, path: Path
    ) -> None:
        num_bytes = shape[0] * shape[1] * shape[2] * dtype.itemsize
        self.path: Path | None = None
        if num_bytes <= budget_bytes:
            self._states = torch.empty(shape, dtype=dtype)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.path = path
            numel = shape[0] * shape[1] * shape[2]
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
