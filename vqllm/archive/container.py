"""A checkpoint as one file, and back to the same bytes.

The file is a zip archive, so that any tool lists it:

    archive.json        {"format": "vqllm-archive", "version": 1,
                         "files": {name: {"bytes": of the file, "sha256": of it, hex}}}
    files/NAME          a file of the folder, compressed by LZMA
    tensors/NAME        a safetensors file of the folder: the blob of `tensors.py`
    tensors/NAME.json   what `tensors.pack` says of the blob

Entries have no times and a fixed order: the same folder gives the same bytes.
"""

import json
import lzma
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vqllm.archive import tensors
from vqllm.archive.range_coder import check_installed
from vqllm.checkpoint import atomic, checksums
from vqllm.checkpoint.new_folder import new_folder
from vqllm.checkpoint.resume.journal import is_unfinished
from vqllm.checkpoint.shards import DAMAGED, read_index, sha256_of
from vqllm.core.protocols import JSON
from vqllm.errors import CheckpointError

FORMAT, VERSION = "vqllm-archive", 1
ABOUT = "archive.json"
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    KeyError,
    TypeError,
    ValueError,
    AssertionError,
)
"""What reading a damaged archive raises, here and in zipfile, zlib, numpy and constriction."""


@dataclass(frozen=True)
class Archived:
    """Sizes in bytes."""

    before: int
    """of all files of the folder"""
    after: int
    """of the archive"""
    kinds: Mapping[str, tuple[int, int]]
    """of tensors with the same last part of their names, before and after"""


def archive(folder: str | Path, output: str | Path) -> Archived:
    """Write a folder as one file that `unarchive` gives the same bytes back from.

    Tensors are coded by their entropy where that makes them smaller; one block of 16 MB of one
    tensor is in memory at a time. The file appears whole, or not at all.

    Args:
        folder: a checkpoint: safetensors files with their index, and files beside them. Hidden
            files and folders are left out.
        output: the file; it must not be there.

    Raises:
        CheckpointError: `folder` is no finished checkpoint, a file of it is damaged, `output` is
            there.
        OutOfSpaceError: the disk is full.
        VqllmError: the package `constriction` is not installed.
    """
    check_installed()
    folder, output = Path(folder), Path(output)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}.")
    if is_unfinished(folder):
        raise CheckpointError(
            f"{folder} holds an unfinished run. Repeat its command to finish it, then archive it."
        )
    index = read_index(folder)
    checksums.compare(folder, index)
    names = _files_of(folder)
    before = sum((folder / name).stat().st_size for name in names)
    kinds: dict[str, list[int]] = {}
    coded: tensors.Known = {}
    with _new_file(output, before) as partial, zipfile.ZipFile(partial, "w") as made:
        # Those in the index were just compared with their files.
        known = index.checksums
        about = {name: _about(folder / name, known.get(name)) for name in names}
        _write(made, ABOUT, _json({"format": FORMAT, "version": VERSION, "files": about}))
        for name in names:
            if name.endswith(".safetensors"):
                _count(_add_tensors(made, folder / name, name, coded), kinds)
            else:
                _write(made, f"files/{name}", (folder / name).read_bytes())
    pairs = {kind: (own[0], own[1]) for kind, own in kinds.items()}
    return Archived(before, output.stat().st_size, pairs)


def unarchive(file: str | Path, output: str | Path) -> Path:
    """Write the folder that an archive was made of, file by file the same bytes.

    The sha256 of every file is compared. The folder appears whole, or not at all.

    Args:
        output: a new or an empty folder.

    Returns:
        `output`.

    Raises:
        CheckpointError: `file` is no archive, of a newer version, or damaged; `output` is in use.
        OutOfSpaceError: the disk is full.
        VqllmError: the package `constriction` is not installed.
    """
    check_installed()
    file, output = Path(file), Path(output)
    with _opened(file) as made:
        files = _files_in(file, made)
        total = sum(about["bytes"] for about in files.values())
        with new_folder(output, total, "checkpoint") as partial:
            for name, about in files.items():
                _extract(file, made, name, about, partial / name)
    return output


def _files_of(folder: Path) -> list[str]:
    """Names of all files with "/" between folders, sorted; those that links lead to count."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            found.append(name.as_posix())
    return found


def _about(path: Path, digest: str | None) -> JSON:
    return {"bytes": path.stat().st_size, "sha256": digest or sha256_of(path)}


def _json(values: JSON) -> bytes:
    return json.dumps(values, separators=(",", ":"), sort_keys=True).encode()


def _entry(name: str, compression: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)  # of 1980, whenever it is written
    entry.compress_type = compression
    entry.external_attr = 0o644 << 16
    return entry


def _write(made: zipfile.ZipFile, name: str, data: bytes) -> None:
    made.writestr(_entry(name, zipfile.ZIP_LZMA), data)


def _add_tensors(made: zipfile.ZipFile, path: Path, name: str, known: tensors.Known) -> JSON:
    stored = _entry(f"tensors/{name}", zipfile.ZIP_STORED)
    with made.open(stored, "w", force_zip64=True) as blob:
        about = tensors.pack(path, blob, known)
    _write(made, f"tensors/{name}.json", _json(about))
    return about


def _count(about: JSON, kinds: dict[str, list[int]]) -> None:
    """Add the tensors of a file to the sums of their kinds."""
    for tensor in about["tensors"]:
        kind = kinds.setdefault(tensor["name"].rpartition(".")[2], [0, 0])
        for block in tensor["blocks"]:
            kind[0] += block["rows"] * tensor["row_bytes"]
            kind[1] += block["bytes"]


@contextmanager
def _new_file(output: Path, most_bytes: int) -> Iterator[Path]:
    """A place for a file that appears as `output` when it is whole."""
    if output.exists():
        raise CheckpointError(f"{output} is there already. Delete it, or choose another name.")
    atomic.make_folder(output.absolute().parent)
    atomic.check_space(output.absolute().parent, most_bytes)
    partial = output.with_name(f".{output.name[:64]}.partial")
    try:
        yield partial
        partial.replace(output)
        atomic.sync_folder(output.absolute().parent)
    except OSError as error:
        if atomic.is_out_of_space(error):
            raise atomic.out_of_space(output, most_bytes) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    """An archive for reading. CheckpointError for a file that is none, or whose data are damaged:
    what cannot be read inside is said the same way."""
    if not file.is_file():
        raise CheckpointError(f"there is no file {file}.")
    try:
        with zipfile.ZipFile(file) as made:
            yield made
    except DAMAGE as error:
        raise CheckpointError(f"{file} is no archive, or damaged: {error}. {DAMAGED}") from error


def _files_in(file: Path, made: zipfile.ZipFile) -> dict[str, JSON]:
    """Size and sha256 of the files, by name."""
    about = json.loads(made.read(ABOUT))
    if about["format"] != FORMAT:
        raise CheckpointError(f"{file} is no archive of this kind.")
    if about["version"] > VERSION:
        raise CheckpointError(
            f"{file} is an archive of version {about['version']}, newer than {VERSION}, which this "
            "vqllm reads. Update vqllm."
        )
    # A name with ".." in it could write any file of the machine.
    for name in about["files"]:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise CheckpointError(f"{file} names a file outside its folder: {name!r}.")
    return about["files"]


def _extract(file: Path, made: zipfile.ZipFile, name: str, about: JSON, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as target:
        if f"files/{name}" in made.NameToInfo:
            with made.open(f"files/{name}") as stored:
                shutil.copyfileobj(stored, target)
        else:
            with made.open(f"tensors/{name}") as blob:
                tensors.unpack(json.loads(made.read(f"tensors/{name}.json")), blob, target)
        target.flush()
        os.fsync(target.fileno())
    if sha256_of(path) != about["sha256"]:
        raise CheckpointError(
            f"{file}: what was read for {name} does not have the sha256 that the archive records. "
            f"{DAMAGED}"
        )
