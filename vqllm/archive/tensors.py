"""One safetensors file as a blob and what is to be known of it, and back.

blob     the file's own header (length and JSON, as they are; zlib), then the blocks of each
         tensor in the order of the file
blocks   rows of a tensor, at most `MOST_SYMBOLS` bytes; each is stored as it is, by zlib, or as
         the streams of a view, whichever is smallest
"""

import json
import zlib
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from vqllm.archive.coding import Model, decoded, encoded, fitted, one_class
from vqllm.archive.views import Bytes, View, views_of
from vqllm.checkpoint.shards import read_header
from vqllm.core.protocols import JSON

MOST_BYTES = 1 << 24
"""Of a block, which bounds the memory: about 40 bytes for each of them."""
LEAST_GAIN = 0.002
"""Of the bytes of a block, below which it is stored as it is: it is read faster so."""
SMALL = 2048
"""Bytes up to which zlib alone is tried."""
SAMPLE = 1 << 18
"""Bytes of a tensor that its view is chosen by."""
CANDIDATES = 2
"""Views that models with several classes are tried for: those of the fewest bits with one."""

Chosen = tuple[View, list[Model]]
Kind = tuple[str, str]
"""The last part of a tensor's name, and its dtype"""
Known = dict[tuple[str, str, int, bool], Chosen | None]
"""How the first tensor of a kind, of some bytes a row, small or not, was coded; others are coded
alike"""
FLOATS = ("F16", "BF16", "F32", "F64")


def pack(path: Path, blob: IO[bytes], known: Known) -> JSON:
    """Write a file's blob.

    Args:
        known: how tensors of files before were coded, which goes on.

    Returns:
        {"header": bytes of it, "tensors": [{"name", "rows", "row_bytes", "blocks": [...]}, ...]}

    Raises:
        CheckpointError: the file is damaged.
    """
    read_header(path)
    with path.open("rb") as file:
        length = file.read(8)
        header = length + file.read(int.from_bytes(length, "little"))
        packed = zlib.compress(header, 9)
        blob.write(packed)
        entries = json.loads(header[8:])
        entries.pop("__metadata__", None)
        tensors = []
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            file.seek(len(header) + begin)
            kind = (name.rpartition(".")[2], entry["dtype"])
            about = _pack_tensor(file, entry, end - begin, blob, known, kind)
            tensors.append({"name": name, **about})
    return {"header": len(packed), "tensors": tensors}


def unpack(about: JSON, blob: IO[bytes], file: BinaryIO) -> None:
    """Write the file that `pack` was given. ValueError, zlib.error or KeyError for damaged data."""
    file.write(zlib.decompress(blob.read(about["header"])))
    for tensor in about["tensors"]:
        for block in tensor["blocks"]:
            data = blob.read(block["bytes"])
            file.write(_unpack_block(block, data, tensor["row_bytes"]))


def _pack_tensor(
    file: BinaryIO, entry: JSON, num_bytes: int, blob: IO[bytes], known: Known, kind: Kind
) -> JSON:
    shape = entry["shape"]
    numel = int(np.prod(shape, dtype=np.int64))
    item_bytes = num_bytes // max(numel, 1) or 1  # numbers below a byte count as bytes
    row_bytes = max(num_bytes // int(np.prod(shape[:-1], dtype=np.int64)), 1) if numel else 1
    rows = num_bytes // row_bytes
    is_float = entry["dtype"] in FLOATS
    step = max(1, MOST_BYTES // row_bytes)
    blocks = []
    for first in range(0, rows, step):
        num = min(step, rows - first)
        data = np.frombuffer(file.read(num * row_bytes), np.uint8).reshape(num, row_bytes)
        own = (*kind, row_bytes, num_bytes <= SMALL)
        if own not in known:
            known[own] = _best_view(data, item_bytes, is_float)
        about, packed = _pack_block(data, known[own])
        blob.write(packed)
        blocks.append({"rows": num, **about, "bytes": len(packed)})
    return {"row_bytes": row_bytes, "blocks": blocks}


def _best_view(data: Bytes, item_bytes: int, is_float: bool) -> Chosen | None:
    """The view of the fewest bytes for a part of the rows, and the models of its streams; None
    where none pays."""
    if data.nbytes <= SMALL:
        return None
    num = max(1, SAMPLE // data.shape[1])
    sample = data[:: max(1, len(data) // num)][:num]
    simple = []
    for view in views_of(item_bytes, is_float):
        streams = view.symbols(sample)
        if streams is not None:
            bits = sum(one_class(stream).bits for stream in streams)
            simple.append((bits, len(simple), view, streams))
    best, least = None, 8 * (1 - LEAST_GAIN) * sample.nbytes
    for _, _, view, streams in sorted(simple, key=lambda own: own[:2])[:CANDIDATES]:
        models = [fitted(stream) for stream in streams]
        bits = sum(model.bits for model in models)
        if bits < least:
            best, least = (view, models), bits
    return best


def _pack_block(data: Bytes, chosen: Chosen | None) -> tuple[JSON, bytes]:
    raw = data.tobytes()
    if chosen is not None:
        view, models = chosen
        streams = view.symbols(data) or []  # none where these rows have bits that others have not
        coded = [encoded(own, fitted(own, like)) for own, like in zip(streams, models)]
        packed = b"".join(part for _, part in coded)
        if streams and len(packed) < len(raw):
            about = {"kind": view.kind, "width": view.width}
            return {**about, "streams": [own for own, _ in coded]}, packed
    if len(raw) <= SMALL and len(packed := zlib.compress(raw, 9)) < len(raw):
        return {"kind": "zlib"}, packed
    return {"kind": "stored"}, raw


def _unpack_block(block: JSON, data: bytes, row_bytes: int) -> bytes:
    if block["kind"] == "stored":
        return data
    if block["kind"] == "zlib":
        return zlib.decompress(data)
    view, at, streams = View(block["kind"], block["width"]), 0, []
    for about, cols in zip(block["streams"], view.num_symbols(row_bytes), strict=True):
        size = sum(about["bytes"])
        streams.append(decoded(about, data[at : at + size], block["rows"], cols))
        at += size
    return view.bytes(streams, row_bytes).tobytes()
