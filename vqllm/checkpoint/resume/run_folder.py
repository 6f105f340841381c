"""The output folder of a run, open for one process, and the files in it that only a run needs."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vqllm.checkpoint import atomic
from vqllm.checkpoint.format import JSON
from vqllm.checkpoint.resume.journal import Journal

logger = logging.getLogger(__name__)

RECORD = "told"
"""The tensor of a file of `save_record` that holds the JSON values, in UTF-8."""


class RunFolder:
    """A folder with a journal; entering one with an unfinished run goes on with it.

    A context manager: at its end, with or without an error, another process may open the folder,
    and the saved files stay in it.

    Attributes:
        scratch: an existing folder for files that only the run needs.
    """

    def __init__(self, output: Path, identity: JSON) -> None:
        """Begin or go on. CheckpointError as of `Journal`."""
        self._output = output
        self._journal = Journal(output, identity)
        self.scratch = self._journal.staging

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._journal.close()

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Store tensors for later in the run, or for when it goes on."""
        atomic.write_shard(self._state_path(name), tensors, self.scratch)

    def load(self, name: str) -> dict[str, Tensor] | None:
        """What `save` wrote; None if there is nothing, or it is damaged."""
        path = self._state_path(name)
        try:
            return load_file(path) if path.is_file() else None
        except (SafetensorError, OSError) as error:
            self._warn(path, error)
            return None

    def load_or_make(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors that are made once a run and read back when it goes on."""
        stored = self.load(name)
        if stored is not None:
            return stored
        # Read from the file, as in a run that goes on.
        self.save(name, make())
        return load_file(self._state_path(name))

    def save_record(self, name: str, record: JSON, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors, and JSON values with them."""
        text = torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)
        self.save(name, {RECORD: text, **{key: tensor.cpu() for key, tensor in tensors.items()}})

    def load_record(self, name: str) -> tuple[JSON, dict[str, Tensor]] | None:
        """What `save_record` wrote; None if there is nothing, or it is damaged."""
        tensors = self.load(name)
        if tensors is None:
            return None
        try:
            return json.loads(bytes(tensors.pop(RECORD).tolist())), tensors
        except (KeyError, ValueError) as error:
            self._warn(self._state_path(name), error)
            return None

    def complete(self, pages: Mapping[str, bytes]) -> None:
        """The run is over: write the pages about it, by file name, and remove all that only a run
        needs."""
        for name, contents in pages.items():
            atomic.write_bytes(self._output / name, contents, self.scratch)
        self._journal.complete()

    def _state_path(self, name: str) -> Path:
        return self.scratch / f"{name}.safetensors"

    def _warn(self, path: Path, error: Exception) -> None:
        logger.warning("%s cannot be read (%s): it is made again", path, error)
