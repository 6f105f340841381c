"""Numbers in the head of a GGUF file are compared with its size before anything believes them."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.unit.test_models import write_gguf
from vqllm.errors import ModelError
from vqllm.models import gguf_claims
from vqllm.models.resolve import resolve


def write(file: Path, layers: int = 2, **options: gguf.GGUFEndian) -> bytes:
    writer = gguf.GGUFWriter(file, "llama", **options)
    writer.add_block_count(layers)
    writer.add_token_list(["a", "bc", "dé"])
    writer.add_array("x.numbers", [1, 2, 3])
    writer.add_float32("x.float", 1.5)
    for name in ("token_embd.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes()


@pytest.mark.parametrize("order", list(gguf.GGUFEndian))
def test_a_whole_file_passes(order: gguf.GGUFEndian, tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", endianess=order)
    gguf_claims.check(tmp_path / "x.gguf")


def after(data: bytes, key: bytes, skip: int) -> int:
    return data.index(key) + len(key) + skip


LARGE = struct.pack("<Q", 1 << 31)


@pytest.mark.parametrize(
    ("place", "number"),
    [
        (lambda data: 8, LARGE),  # tensors
        (lambda data: 16, LARGE),  # values
        (lambda data: 24, LARGE),  # the length of a key
        (lambda data: after(data, b"x.numbers", 8), LARGE),  # of an array
        (lambda data: after(data, b"tokenizer.ggml.tokens", 8), LARGE),
        (lambda data: after(data, b"token_embd.weight", 4), LARGE),  # a dimension
        (lambda data: after(data, b"token_embd.weight", 0), LARGE[:4]),  # their number
        (lambda data: after(data, b"block_count", 4), struct.pack("<I", 1 << 31)),
    ],
)
def test_claims_beyond_the_size_are_refused(place, number: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    data = bytearray(write(file))
    start = place(bytes(data))
    data[start : start + len(number)] = number
    file.write_bytes(data)
    with pytest.raises(ModelError, match=r"x\.gguf is damaged: "):
        gguf_claims.check(file)


def test_truncated_and_extended_files(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    data = write(file)
    for size in range(4, 200, 7):
        file.write_bytes(data[:size])
        with pytest.raises(ModelError, match="is damaged"):
            gguf_claims.check(file)
    with file.open("r+b") as stream:  # sparse
        stream.write(data)
        stream.truncate(1 << 40)
    with pytest.raises(ModelError, match="more than its tensors can take"):
        gguf_claims.check(file)


@pytest.mark.parametrize("key", [b"llama.embedding_length", b"llama.attention.head_count"])
def test_larger_models_than_the_tensors(
    key: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VQLLM_CACHE", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "tiny.gguf")
    data = bytearray(file.read_bytes())
    start = after(bytes(data), key, 4)
    data[start : start + 4] = struct.pack("<I", 10**7)
    file.write_bytes(data)
    with pytest.raises(ModelError, match=r"tiny\.gguf (asks for|is damaged|cannot be loaded)"):
        resolve(file)
