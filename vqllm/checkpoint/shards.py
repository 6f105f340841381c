"""Safetensors files without their tensors: headers, checksums, which tensor is in which file."""

import hashlib
import math
import re
import reprlib
import stat
from dataclasses import dataclass
from pathlib import Path

import torch

from vqllm.checkpoint.format import INDEX, JSON, SINGLE
from vqllm.core import json_text
from vqllm.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""What safetensors itself accepts; a larger number is no header."""

DTYPE_NAMES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
"""Names of dtypes in the headers."""

DAMAGED = "Get an undamaged copy, or make it again."


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it; `dtype` is safetensors' name ("BF16")."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, without reading them.

    Raises:
        CheckpointError: the file is missing, truncated, or not safetensors.
    """
    # A safetensors file is 8 bytes of header length, the header in JSON, then the bytes of all
    # tensors without gaps: so the header gives the size that the file must have.
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # a pipe would never end
            raise ValueError("no ordinary file")
        size = about.st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json_text.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _stored_tensor(info) for name, info in header.items()}
        expected = 8 + length + sum(tensor.num_bytes for tensor in tensors.values())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing. {DAMAGED}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. {DAMAGED}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}. {DAMAGED}") from error
    if size != expected:
        raise CheckpointError(
            f"{path} has {size} bytes where its header announces {expected}: it is truncated or "
            f"damaged. {DAMAGED}"
        )
    return tensors


def _stored_tensor(info: JSON) -> StoredTensor:
    """An entry of a header. ValueError for values of other types than they have."""
    dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"a tensor with the entry {reprlib.repr(info)}")
    return StoredTensor(dtype, tuple(shape), end - begin)


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def sha256_of(path: Path) -> str:
    """sha256 of a whole file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class ShardIndex:
    """Which file holds each tensor, and the checksums if they were recorded."""

    files: dict[str, str]
    checksums: dict[str, str]
    total_size: int | None = None
    """bytes of all tensors, if the index says so"""


def read_index(folder: Path) -> ShardIndex:
    """The index of a folder, or the contents of its only file.

    As in transformers, a file with the whole model goes before an index of several, which may be
    left from an earlier model.

    Raises:
        CheckpointError: neither is there, or the index is damaged.
    """
    # Of a single file there is no checksum.
    path = folder / INDEX
    if (folder / SINGLE).is_file():
        return ShardIndex(dict.fromkeys(read_header(folder / SINGLE), SINGLE), {})
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {INDEX} and no {SINGLE}: its weights are missing. {DAMAGED}"
        )
    try:
        index: JSON = json_text.read(path)
        files = {str(name): str(file) for name, file in index["weight_map"].items()}
        metadata = index.get("metadata", {})
        recorded = metadata.get("vqllm", {}).get("sha256", {})
        size = metadata.get("total_size")
        checksums = {str(file): str(digest) for file, digest in recorded.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}. {DAMAGED}") from error
    # A name with a folder in it could make a reader open any file of the machine.
    outside = sorted(file for file in {*files.values(), *checksums} if Path(file).name != file)
    if outside:
        raise CheckpointError(f"{path} names files outside its folder: {', '.join(outside)}.")
    return ShardIndex(files, checksums, size if type(size) is int else None)
