"""The journal of a run: with it a killed run goes on, and a different run is refused.

OUT/.vqllm/journal.jsonl has one JSON object a line. The first is the identity of the run:
everything that could change a byte of the result. Each further line is a finished layer, written
after its shard is on the disk. The folder `.vqllm` also stages files and is gone at the end.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from vqllm._version import __version__
from vqllm.checkpoint import atomic
from vqllm.checkpoint.format import CONFIG, FORMAT_VERSION, JSON
from vqllm.checkpoint.shards import sha256_of
from vqllm.checkpoint.side_files import copied_files
from vqllm.errors import CheckpointError

logger = logging.getLogger(__name__)

WORK = ".vqllm"
JOURNAL = "journal.jsonl"
LOCK = "lock"
ROUNDED = "rounded"
"""Folder in WORK with the checkpoint that a run quantizes first and tunes then."""

NUM_SAMPLES = 64
SAMPLE_BYTES = 4096
"""Samples of each weight file, besides its header: 256 KB in all, spread over a file of any size.
They differ in a retrained copy of a model, whose header and size are equal, and take milliseconds.
"""


@dataclass(frozen=True, kw_only=True)
class FinishedLayer:
    """A line of the journal.

    `linears` holds the specification of each quantized linear (`format.spec_to_dict`) by full
    name, `records` the layer's lines of the report.
    """

    layer: int
    shard: str
    sha256: str
    linears: dict[str, JSON]
    records: list[JSON]


def identity(
    *, model: str, source: Path, recipe: JSON, settings: JSON, trust_remote_code: bool = False
) -> JSON:
    """Everything that could change a byte of the result.

    Args:
        model: the model as its user named it.
        source: its folder.
        recipe: the resolved recipe, every field present, the seed included.
        settings: what else the caller knows to matter: dtypes, the kind of device.
    """
    return {
        "format_version": FORMAT_VERSION,
        "model": model,
        "recipe": recipe,
        "settings": {**settings, "trust_remote_code": trust_remote_code},
        "source": fingerprint(source, trust_remote_code),
        "versions": {
            "vqllm": __version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
    }


def fingerprint(source: Path, trust_remote_code: bool = False) -> dict[str, str]:
    """A short digest of every file of a model folder that goes into the result.

    Small files are read whole, weights by size, header and samples.
    """
    digests = {
        str(path): sha256_of(source / path)[:16] for path in copied_files(source, trust_remote_code)
    }
    digests[CONFIG] = sha256_of(source / CONFIG)[:16]
    for path in source.glob("*.safetensors"):
        digests[path.name] = _sampled_digest(path)
    return dict(sorted(digests.items()))


def _sampled_digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(length, size)))
        for i in range(NUM_SAMPLES):
            file.seek(i * max(size - SAMPLE_BYTES, 0) // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


class Journal:
    """The journal of one run, open for one process.

    Attributes:
        finished: the layers that need not be done again, each verified.
        staging: an existing folder for files that are not finished.
    """

    def __init__(self, folder: Path, identity: JSON) -> None:
        """Begin a run in `folder`, or go on with the unfinished one there.

        Raises:
            CheckpointError: something else is in the folder, another process is at work in it, or
                the run there is another one.
        """
        self._folder = folder
        self.staging = folder / WORK
        self._path = self.staging / JOURNAL
        self.finished: list[FinishedLayer] = []
        # Without a journal this is a new run, which needs an empty folder.
        if WORK not in atomic.names_in(folder) or not self._path.is_file():
            _check_empty(folder)
        atomic.make_folder(self.staging)
        # The lock goes with the process, also with a killed one.
        self._lock = FileLock(self.staging / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise CheckpointError(
                f"another process is writing to {folder}. Wait for it, stop it, or choose another "
                "output folder."
            ) from error
        try:
            self._begin(identity)
        except BaseException:
            self.close()
            raise

    def _begin(self, identity: JSON) -> None:
        if not self._path.is_file():
            atomic.write_bytes(self._path, _line(identity), self.staging)
            return
        lines = _whole_lines(self._path)
        # The first line says which run this is: it must be the same, or have computed nothing yet.
        if lines and self._is_replaceable(lines[0], identity):
            lines = [json.loads(_line(identity))]
        if lines:
            _check_identity(lines[0], identity, self._folder)
        elif found := [name for name in atomic.names_in(self._folder) if name != WORK]:
            raise CheckpointError(
                f"{self._path} is empty, but {self._folder} holds {', '.join(found[:3])}. Delete "
                "the folder and start again."
            )
        # Finished layers count up to the first one whose shard is missing or changed.
        for number, values in enumerate(lines[1:]):
            try:
                layer = FinishedLayer(**values)
            except TypeError as error:
                raise _damaged(self._path, number + 2, error) from error
            problem = self._problem(number, layer)
            if problem:
                logger.warning("%s: layers from %d on are done again", problem, number)
                break
            self.finished.append(layer)
        # Without the torn line of a killed process, and without layers that cannot be trusted.
        trusted = [_line(identity), *(_line(asdict(layer)) for layer in self.finished)]
        atomic.write_bytes(self._path, b"".join(trusted), self.staging)

    def _is_replaceable(self, old: JSON, new: JSON) -> bool:
        """Whether the unfinished run here has computed nothing, so that another may take its place:
        a mistake that is noticed at once (a text that is too short) leaves such a folder.

        A rounded checkpoint in `ROUNDED` has a journal of its own; it stays for a run that tunes
        the same model.
        """
        names = {*atomic.names_in(self._folder), *atomic.names_in(self.staging)}
        names -= {WORK, JOURNAL, LOCK}
        return not names or (names == {ROUNDED} and old.get("model") == new.get("model"))

    def _problem(self, number: int, layer: FinishedLayer) -> str | None:
        """Why a line of the journal cannot be trusted; None if it can."""
        path = self._folder / layer.shard
        if layer.layer != number:
            return f"{self._path} has layer {layer.layer} where layer {number} is due"
        if not path.is_file():
            return f"{path} is missing"
        if sha256_of(path) != layer.sha256:
            return f"{path} does not have the sha256 that was recorded when it was written"
        return None

    def append(self, layer: FinishedLayer) -> None:
        """Record a layer whose shard is on the disk."""
        data = _line(asdict(layer))
        size = self._path.stat().st_size
        try:
            with self._path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            os.truncate(self._path, size)
            if atomic.is_out_of_space(error):
                raise atomic.out_of_space(self._path, len(data)) from error
            raise
        self.finished.append(layer)

    def complete(self) -> None:
        """The checkpoint is whole: remove everything that only a running run needs.

        The journal is removed first: a run that is killed in here counts as finished. The next
        command that is refused because of the finished checkpoint removes the rest.
        """
        self._path.unlink()
        atomic.sync_folder(self.staging)
        self.close()
        shutil.rmtree(self.staging, ignore_errors=True)
        atomic.sync_folder(self._folder)

    def close(self) -> None:
        """Let another process go on with this run."""
        self._lock.release()


def check_free(folder: Path) -> None:
    """Refuse a folder in which no run could begin or go on. CheckpointError says why."""
    if not is_unfinished(folder):
        _check_empty(folder)


def is_unfinished(folder: Path) -> bool:
    """Whether `folder` has an unfinished run, which can go on."""
    return (folder / WORK / JOURNAL).is_file()


def _line(values: JSON) -> bytes:
    return (json.dumps(values, sort_keys=True) + "\n").encode()


def _whole_lines(path: Path) -> list[JSON]:
    """The lines of a journal; one that a killed process did not finish is left out."""
    lines = path.read_bytes().split(b"\n")
    values = []
    for number, line in enumerate(lines[:-1]):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError(f"{type(value).__name__} in place of an object")
        except ValueError as error:
            if number == len(lines) - 2:
                break
            raise _damaged(path, number + 1, error) from error
        values.append(value)
    return values


def _damaged(path: Path, number: int, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"line {number} of {path} is damaged: {error}. Delete the folder {path.parent.parent} and "
        "start again."
    )


def _check_empty(folder: Path) -> None:
    """Raise CheckpointError if `folder` holds anything but the working files of a run."""
    names = [name for name in atomic.names_in(folder) if name != WORK]
    if not names:
        return
    if _is_finished(folder):
        shutil.rmtree(folder / WORK, ignore_errors=True)  # of a run killed in `complete`
        raise CheckpointError(
            f"{folder} holds a finished checkpoint. Use it, or delete it or choose another output "
            "folder to make a new one."
        )
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise CheckpointError(
        f"{folder} is not empty: {', '.join(names[:3])}{more}. The output must be a new or empty "
        "folder, or one in which this run was begun."
    )


def _is_finished(folder: Path) -> bool:
    path = folder / CONFIG
    return path.is_file() and b'"quantization_config"' in path.read_bytes()


def _check_identity(old: JSON, new: JSON, folder: Path) -> None:
    """Raise CheckpointError with all differences between the unfinished run and this one."""
    lines = differences(old, new)
    if lines:
        rounded = folder / WORK / ROUNDED
        advice = ""
        if _is_finished(rounded) and not is_unfinished(rounded):
            advice = (
                f" Its linears are all rounded: vqllm tune {rounded} --output OTHER tunes them in "
                "another way."
            )
        raise CheckpointError(
            f"{folder} holds an unfinished run that differs (there → here):\n"
            + "\n".join(lines)
            + "\nTo go on with it, repeat the command that began it. To start over, delete the "
            f"folder or choose another one.{advice}"
        )


def differences(old: JSON, new: JSON) -> list[str]:
    """A line for every value that differs, by its place: there → here."""
    before, now = _flatten(old), _flatten(json.loads(json.dumps(new)))
    return [
        f"  {key}: {_shown(before, key)} → {_shown(now, key)}"
        for key in sorted(before.keys() | now.keys())
        if _shown(before, key) != _shown(now, key)
    ]


def _flatten(values: object, prefix: str = "") -> dict[str, object]:
    """The values inside JSON objects and lists by their dotted place: `recipe.codec.type`."""
    if isinstance(values, list):
        values = dict(enumerate(values))
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _shown(values: dict[str, object], key: str) -> str:
    return json.dumps(values[key], sort_keys=True) if key in values else "(absent)"
