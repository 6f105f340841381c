"""What a comparison has in its folder, so that it goes on after it was stopped at any moment.

OUT/NAME/                 the checkpoint of a member
OUT/comparison.*          page, plot and JSON of what is finished
OUT/.vqllm/comparison.json          the identity: what all members must share
OUT/.vqllm/results/NAME.json        what came out of a finished member
OUT/.vqllm/sequences-*.safetensors  calibration sequences, shared by members
OUT/.vqllm/original/                what the original model's predictions are made from
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vqllm.checkpoint import atomic
from vqllm.checkpoint.resume.journal import LOCK, WORK, differences
from vqllm.core import json_text
from vqllm.core.protocols import JSON
from vqllm.errors import CheckpointError

logger = logging.getLogger(__name__)

IDENTITY = "comparison.json"


class Store:
    """The folder of a comparison, open for one process. A context manager."""

    def __init__(self, folder: Path, identity: JSON) -> None:
        """Begin a comparison in a folder, or go on with the one that stands there.

        Raises:
            CheckpointError: something else is in the folder, another process is at work in it, or
                the comparison there shares other things.
        """
        self.folder, self.staging = folder, folder / WORK
        self.original = self.staging / "original"
        # Nobody else's files, and no other process.
        path = self.staging / IDENTITY
        found = [name for name in atomic.names_in(folder) if name != WORK]
        if found and not path.is_file():
            raise CheckpointError(
                f"{folder} is not empty, and no comparison was begun there: "
                + ", ".join(found[:3])
                + ". The output must be a new or empty folder, or that of this comparison."
            )
        atomic.make_folder(self.staging / "results")
        self._lock = FileLock(self.staging / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise CheckpointError(
                f"another process is comparing in {folder}. Wait for it, stop it, or choose "
                "another output folder."
            ) from error
        # The comparison that stands there must be this one.
        try:
            self._begin(path, identity)
        except BaseException:
            self._lock.release()
            raise

    def _begin(self, path: Path, identity: JSON) -> None:
        if not path.is_file():
            atomic.write_bytes(path, _json(identity), self.staging)
            return
        remedy = "Choose another output folder; the checkpoints in this one are not touched."
        lines = differences(_read(path, remedy), identity)
        if lines:
            raise CheckpointError(
                f"{self.folder} holds a comparison that differs (there → here):\n"
                + "\n".join(lines)
                + "\nIts members would not be comparable with new ones. To go on with it, repeat "
                "these settings (recipes may be added); else choose another output folder."
            )

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()

    def result(self, name: str) -> JSON | None:
        """What came out of a member; None if it is not finished."""
        path = self._result_path(name)
        remedy = f"Delete it and {self.folder / name} to do this member again."
        return _read(path, remedy) if path.is_file() else None

    def save_result(self, name: str, result: JSON) -> None:
        """Record what came out of a member."""
        atomic.write_bytes(self._result_path(name), _json(result), self.staging)

    def sequences(self, key: JSON, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Token sequences that are made once for all members of one `key`."""
        digest = hashlib.sha256(_json(key)).hexdigest()[:16]
        path = self.staging / f"sequences-{digest}.safetensors"
        if path.is_file():
            try:
                return load_file(path)
            except (SafetensorError, OSError) as error:
                logger.warning("%s cannot be read (%s): it is made again", path, error)
        tensors = dict(make())
        atomic.write_shard(path, tensors, self.staging)
        return tensors

    def publish(self, pages: Mapping[str, bytes]) -> None:
        """Write the pages about what is finished, by file name."""
        for name, contents in pages.items():
            atomic.write_bytes(self.folder / name, contents, self.staging)

    def _result_path(self, name: str) -> Path:
        return self.staging / "results" / f"{name}.json"


def _read(path: Path, remedy: str) -> JSON:
    try:
        values = json_text.read(path)
        if not isinstance(values, dict):
            raise ValueError(f"{type(values).__name__} in place of an object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. {remedy}") from error
    return values


def _json(values: JSON) -> bytes:
    return (json.dumps(values, sort_keys=True, indent=1) + "\n").encode()
