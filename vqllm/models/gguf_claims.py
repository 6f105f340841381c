"""What the head of a GGUF file claims, compared with the size of the file.

The libraries that read GGUF believe its numbers: an array of 2^31 entries in a file of a kilobyte
takes them a minute and 3 GB. Here the head is walked through once, without keeping any of it.

    "GGUF", version u32, tensors u64, values u64
    value     key string, type u32, then the value
    tensor    name string, dimensions u32, sizes u64 each, type u32, offset u64
    string    length u64, bytes

Source: the GGUF specification, ggml-org/ggml, docs/gguf.md.
"""

import struct
from pathlib import Path
from typing import BinaryIO

from vqllm.errors import ModelError

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the types of a value, by number; besides these there are strings and arrays."""
STRING, ARRAY = 8, 9
MAX_DIMENSIONS, MAX_NESTING = 8, 4
LEAST_BITS = 1.0
"""Of a stored weight; the smallest types have 1.56."""
MOST_BYTES, MOST_PADDING = 8, 1 << 20
"""Of a stored weight, and between two tensors."""
FEW_LAYERS = 1000


class _Claim(Exception):
    """What is wrong with a claim."""


def check(file: Path) -> None:
    """Raise ModelError for a file that claims more than it has. Reads its head only."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            _Head(stream, size).walk()
    except (_Claim, struct.error) as error:
        raise ModelError(
            f"{file} is damaged: {error or 'it ends in its head'}. Compare its sha256 with its "
            "source, and fetch it again."
        ) from error
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}.") from error


class _Head:
    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size = stream, size
        self._order = "<"

    def walk(self) -> None:
        """Go through all values and tensors."""
        self._skip(4, "the mark GGUF")
        version = self._number("I")
        if version & 0xFFFF == 0:  # written on a machine of the other byte order
            self._order, version = ">", version >> 24
        if version == 1:
            raise _Claim("version 1 of GGUF, which nothing writes any more")
        num_tensors, num_values = self._number("Q"), self._number("Q")
        # A value takes 13 bytes at least, a tensor 24.
        what = f"{num_values} values and {num_tensors} tensors"
        self._check(num_values * 13 + num_tensors * 24, what)
        layers = 0
        for _ in range(num_values):
            key = self._string()
            kind = self._number("I")
            if key.endswith(b".block_count") and kind in (4, 5, 10, 11):
                layers = self._number("I" if SIZES[kind] == 4 else "Q")
            else:
                self._value(kind, 0)
        if layers > max(num_tensors, FEW_LAYERS):
            raise _Claim(f"it claims {layers} layers and has {num_tensors} tensors")
        numel = 0
        for _ in range(num_tensors):
            numel += self._tensor()
            self._check(numel * LEAST_BITS / 8, f"tensors of {numel} weights", whole=True)
        most = self._stream.tell() + numel * MOST_BYTES + (num_tensors + 1) * MOST_PADDING
        if self._size > most:
            raise _Claim(f"it has {self._size} bytes, more than its tensors can take ({most})")

    def _tensor(self) -> int:
        """Go past a tensor; how many weights it has."""
        self._string()
        dimensions = self._number("I")
        if dimensions > MAX_DIMENSIONS:
            raise _Claim(f"a tensor of {dimensions} dimensions")
        numel = 1
        for _ in range(dimensions):
            numel *= self._number("Q")
        self._skip(4, "a type")
        if self._number("Q") > self._size:
            raise _Claim("a tensor that begins beyond the end of the file")
        return numel

    def _value(self, kind: int, nesting: int) -> None:
        if kind in SIZES:
            self._skip(SIZES[kind], "a value")
        elif kind == STRING:
            self._string()
        elif kind == ARRAY and nesting < MAX_NESTING:
            inner, length = self._number("I"), self._number("Q")
            if inner in SIZES:
                self._skip(SIZES[inner] * length, f"an array of {length} numbers")
                return
            # A string or an array inside takes at least the 8 bytes of its length.
            self._check(8 * length, f"an array of {length} entries")
            for _ in range(length):
                self._value(inner, nesting + 1)
        else:
            raise _Claim(f"a value of the unknown type {kind}")

    def _string(self) -> bytes:
        """Go past a string; its last bytes."""
        length = self._number("Q")
        self._check(length, f"a string of {length} bytes")
        keep = min(length, 64)
        self._stream.seek(length - keep, 1)
        return self._stream.read(keep)

    def _number(self, form: str) -> int:
        form = self._order + form
        return struct.unpack(form, self._stream.read(struct.calcsize(form)))[0]

    def _skip(self, num_bytes: int, what: str) -> None:
        self._check(num_bytes, what)
        self._stream.seek(num_bytes, 1)

    def _check(self, num_bytes: float, what: str, whole: bool = False) -> None:
        """Raise _Claim unless so many bytes are left, or there in all."""
        left = self._size - (0 if whole else self._stream.tell())
        if num_bytes > left:
            raise _Claim(f"it claims {what}, and has {left} bytes for that")
