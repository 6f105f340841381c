"""Token sequences out of files, folders and data sets."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from tests.support.params import slow, slow_but
from tests.support.tiny import tiny_tokenizer
from vqllm.calibration.data import cut_sequences as sources
from vqllm.calibration.data import text_sources as texts
from vqllm.calibration.data.calibration_set import held_out_of
from vqllm.calibration.data.cut_sequences import load_tokens
from vqllm.calibration.data.text_sources import open_source
from vqllm.errors import CalibrationError

TOKENIZER = tiny_tokenizer()
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def numbered(num_lines: int) -> str:
    """Lines that each say their number, so that a place in the text can be read off."""
    return "".join(f"{line(i)}\n" for i in range(num_lines))


def line(number: int) -> str:
    """A line with its number at both ends."""
    return f"line {number:06d} {WORDS[number % 10]} é {number:06d}"


def line_numbers(tokens_L: torch.Tensor) -> list[int]:
    """Of the lines that are whole: where a sequence goes on in another part of the text, the end of
    one line meets the begin of another, and the numbers differ."""
    found = re.findall(r"line (\d{6}) \w+ é (\d{6})", TOKENIZER.decode(tokens_L))
    return [int(first) for first, last in found if first == last]


def calibration(source: Any, num: int, length: int, seed: int = 0) -> torch.Tensor:
    return load_tokens(source, TOKENIZER, num, length, seed).calibration


def held_out(source: Any, num: int, length: int, seed: int = 0) -> torch.Tensor:
    return load_tokens(source, TOKENIZER, 1, length, seed, num_held_out=num).held_out


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(numbered(3000), encoding="utf-8")
    return file


def test_sequences_are_whole_disjoint_and_spread(text: Path) -> None:
    tokens = calibration(text, 10, 100)
    assert tokens.shape == (10, 100)
    assert tokens.dtype == torch.int64
    tenth = 300 * (1 - sources.HELD_OUT_BYTES / text.stat().st_size)  # of what is not held out
    for i, row in enumerate(map(line_numbers, tokens)):
        assert row == list(range(row[0], row[0] + len(row)))
        assert tenth * i - 1 <= row[0]
        assert row[-1] <= tenth * (i + 1) + 1


def test_the_seed_decides(text: Path) -> None:
    for of in (calibration, held_out):
        first = of(text, 10, 100)
        assert torch.equal(of(text, 10, 100), first)
        assert not torch.equal(of(text, 10, 100, seed=1), first)


@pytest.mark.parametrize(
    ("kind", "num_lines"),
    [
        *(("whole", num) for num in (80, 700)),
        *(("stream", num) for num in (80, 700)),
        slow("whole", 30_000),
        slow("stream", 30_000),
        ("far apart", 30_000),  # only texts of several blocks are read in parts
    ],
)
def test_no_run_calibrates_on_what_another_holds_out(
    tmp_path: Path, kind: str, num_lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines held out by runs of several lengths, numbers and seeds, and those calibrated on."""
    file = tmp_path / "text.txt"
    file.write_text(numbered(num_lines), encoding="utf-8")
    if kind == "far apart":
        monkeypatch.setattr(sources, "WHOLE_BYTES", 1000)
        monkeypatch.setattr(sources, "BYTES_PER_TOKEN", 8)
        monkeypatch.setattr(texts, "BLOCK_BYTES", 512)
    if kind == "stream":
        monkeypatch.setattr(texts.PlainText, "num_bytes", None)
    calibrated: set[int] = set()
    measured: set[int] = set()
    for num, length in ((2, 60), (4, 50), (8, 32), (1, 200)):
        for seed in range(3):
            found = load_tokens(file, TOKENIZER, num, length, seed, num_held_out=2)
            assert len(found.calibration) == num
            assert 1 <= len(found.held_out) <= 2
            calibrated |= {line for row in found.calibration for line in line_numbers(row)}
            measured |= {line for row in found.held_out for line in line_numbers(row)}
    assert len(calibrated) > 10 < len(measured)
    assert not calibrated & measured


@pytest.mark.parametrize(
    "kind",
    slow_but(
        ["long.jsonl"],
        ["a.txt", "line.txt", "a.jsonl", "long.jsonl", "parquet", "folder"],
    ),
)
def test_nor_does_one_that_reads_in_parts(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that read a large source whole, or in parts only; documents and lines longer than a
    block, and sequences longer than what a block holds out."""
    block, held_out, num_lines = 1 << 12, 1 << 9, 4000
    for module, name, value in (
        (sources, "BLOCK_BYTES", block),
        (sources, "HELD_OUT_BYTES", held_out),
        (sources, "FRONT_BYTES", block - held_out),
        (sources, "WHOLE_BYTES", 1000),
        (sources, "PIECE_CHARACTERS", 200),
        (texts, "BLOCK_BYTES", 256),
    ):
        monkeypatch.setattr(module, name, value)
    lines = [line(i) + " " * (kind == "line.txt") for i in range(num_lines)]
    file = tmp_path / kind
    if kind.endswith("txt"):
        file.write_text(("" if kind == "line.txt" else "\n").join(lines), encoding="utf-8")
    elif kind == "folder":
        file.mkdir()
        for i in range(0, num_lines, 700):
            (file / f"{i:04}.txt").write_text("\n".join(lines[i : i + 700]), encoding="utf-8")
    else:
        size = 500 if kind == "long.jsonl" else 5
        documents = ["\n".join(lines[i : i + size]) for i in range(0, num_lines, size)]
        if kind == "parquet":
            file = write_parquet(tmp_path / "a.parquet", documents)
        else:
            write_jsonl(file, [{"other": "x" * 9, "text": text} for text in documents])
    calibrated: set[int] = set()
    measured: set[int] = set()
    shapes = ((2, 90), (6, 50), (1, 700))
    # In parts every draw is another place. Whole, the same text is divided every time.
    draws = [(10**9, seed, shape) for seed in range(3) for shape in shapes]
    draws += [(8, seed, shapes[seed % 3]) for seed in range(300)]
    for bytes_per_token, seed, (num, length) in draws:
        monkeypatch.setattr(sources, "BYTES_PER_TOKEN", bytes_per_token)
        found = load_tokens(file, TOKENIZER, num, length, seed, num_held_out=2)
        for sequences, seen in ((found.calibration, calibrated), (found.held_out, measured)):
            assert len(sequences.unique(dim=0)) == len(sequences)  # no sequence twice
            assert len(sequences) == 2 or sequences is found.calibration
            seen.update(*map(line_numbers, sequences))
    assert len(calibrated) > 100 < len(measured)
    assert not calibrated & measured


def test_the_same_text_elsewhere_has_the_same_sequences(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "elsewhere" / "copy.txt"
    other.parent.mkdir()
    shutil.copy(text, other)
    monkeypatch.chdir(tmp_path)
    first = load_tokens(text, TOKENIZER, 5, 100, seed=3, num_held_out=2)
    for spelling in ("text.txt", "./text.txt", "elsewhere/../text.txt", other, other.parent):
        found = load_tokens(spelling, TOKENIZER, 5, 100, seed=3, num_held_out=2)
        assert torch.equal(found.calibration, first.calibration)
        assert torch.equal(found.held_out, first.held_out)
    twice = load_tokens([text, other], TOKENIZER, 10, 100, seed=3).calibration
    assert not torch.equal(twice[:5], twice[5:])  # their places in the list differ


def test_a_sixteenth_of_a_long_text_is_held_out(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(numbered(40_000), encoding="utf-8")  # three blocks
    asked = load_tokens(file, TOKENIZER, 1, 200, 0, num_held_out=10**5)
    num = len(TOKENIZER(numbered(40_000)).input_ids)
    blocks = file.stat().st_size // sources.BLOCK_BYTES
    share = blocks * sources.HELD_OUT_BYTES / file.stat().st_size
    assert asked.held_out.numel() == pytest.approx(share * num, rel=0.03)
    lines = [line_numbers(row)[0] for row in asked.held_out]
    assert lines == sorted(lines)
    per_block = 40_000 * sources.BLOCK_BYTES / file.stat().st_size
    assert {int(line / per_block) for line in lines} == set(range(blocks))


def test_text_that_just_suffices_is_used_up(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text(numbered(40), encoding="utf-8")
    kept = numbered(40).encode()[: -(len(numbered(40).encode()) // 4)].decode(errors="ignore")
    all_tokens = TOKENIZER(kept).input_ids
    length = len(all_tokens) // 4
    tokens = calibration(file, 4, length)
    assert tokens.flatten().tolist() == all_tokens[: 4 * length]
    with pytest.raises(CalibrationError) as caught:
        calibration(file, 4, length + 1)
    message = str(caught.value)
    assert f"{len(all_tokens)} tokens (beside" in message
    assert f"needed are {4 * (length + 1)}" in message
    assert "calibration.length" in message
    with pytest.raises(CalibrationError, match="less than one sequence of 300"):
        load_tokens(file, TOKENIZER, 1, 300, seed=0, num_held_out=1)


def test_sources_share_equally(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("x y z " * 900, encoding="utf-8")
    tokens = calibration([text, other], 7, 50)
    decoded = [TOKENIZER.decode(row) for row in tokens]
    assert ["line" in row for row in decoded] == [True] * 4 + [False] * 3
    assert len(calibration([text, other], 1, 50)) == 1
    both = load_tokens([text, other], TOKENIZER, 1, 50, seed=0, num_held_out=5).held_out
    assert ["line" in TOKENIZER.decode(row) for row in both] == [True] * 3 + [False] * 2


def test_bos_starts_every_sequence_where_the_tokenizer_adds_it(text: Path) -> None:
    plain = load_tokens(text, TOKENIZER, 4, 49, seed=0, num_held_out=2)
    found = load_tokens(text, tiny_tokenizer(add_bos=True), 4, 50, seed=0, num_held_out=2)
    for tokens, rest in zip(
        (found.calibration, found.held_out), (plain.calibration, plain.held_out)
    ):
        assert (tokens[:, 0] == 0).all()
        assert torch.equal(tokens[:, 1:], rest)


def test_a_large_file_is_read_only_where_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(numbered(30_000), encoding="utf-8")
    monkeypatch.setattr(sources, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(sources, "BYTES_PER_TOKEN", 8)
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(texts, "BLOCK_BYTES", 512)
    tokenized = 0

    def counting(piece: str, **options: Any) -> Any:
        nonlocal tokenized
        tokenized += len(piece)
        return TOKENIZER(piece, **options)

    counting.bos_token_id = None  # type: ignore[attr-defined]
    counting.decode = TOKENIZER.decode  # type: ignore[attr-defined]
    tokens = load_tokens(text, counting, 10, 100, seed=0).calibration
    assert tokenized < 0.2 * text.stat().st_size
    blocks = text.stat().st_size // sources.BLOCK_BYTES
    part = 3000 * blocks * sources.BLOCK_BYTES / text.stat().st_size
    held_out = 30_000 * sources.HELD_OUT_BYTES / text.stat().st_size
    for i, row in enumerate(line_numbers(row) for row in tokens):
        assert row == list(range(row[0], row[0] + len(row)))
        assert part * i - held_out - 1 <= row[0] < part * (i + 1)


def write_jsonl(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_parquet(file: Path, documents: list[str | None], row_group_size: int = 10) -> Path:
    table = pyarrow.table({"text": documents, "other": documents})
    pyarrow.parquet.write_table(table, file, row_group_size=row_group_size)
    return file


def test_documents_are_joined_by_a_blank_line(tmp_path: Path) -> None:
    documents = ["one é", "two\nlines", "three"]
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"text": d} for d in documents])
    parquet = write_parquet(tmp_path / "b.parquet", documents)
    for file in (jsonl, parquet):
        assert "".join(open_source(file).pieces()) == "one é\n\ntwo\nlines\n\nthree"
    assert "".join(open_source(f"{parquet}#other").pieces()).startswith("one é\n\n")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt", "folder"])
def test_reading_can_begin_anywhere(tmp_path: Path, name: str) -> None:
    """With the document at a byte; every piece has its own place wherever reading begins."""
    documents = [f"document {i} é" for i in range(200)]
    if name == "a.txt":
        (tmp_path / name).write_text("\n\n".join(documents) + "\n\n")
    elif name == "a.jsonl":
        write_jsonl(tmp_path / name, [{"id": 7, "text": d} for d in documents])
    elif name == "folder":
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "a.jsonl", [{"text": d} for d in documents[:60]])
        write_parquet(tmp_path / name / "b.parquet", documents[60:])
    else:
        write_parquet(tmp_path / name, documents)
    source = open_source(tmp_path / name)
    num_bytes = source.num_bytes or 0
    # By their ends: the first one has no blank line before it.
    places = {place + len(text.encode()): text.strip() for place, text in source.placed()}
    assert sorted(places) == list(places)
    for start in (0, 1, 9, num_bytes // 4, num_bytes // 2, num_bytes - 40, num_bytes - 1):
        read = list(source.placed(start))
        found = [text for text in "".join(text for _, text in read).split("\n") if text]
        if name == "a.txt":
            assert read[0][0] == start or start == num_bytes - 1
            whole = "".join(source.pieces()).encode()
            assert "".join(text for _, text in read).encode() == whole[start:]
            continue
        assert found == documents[len(documents) - len(found) :]
        assert read[0][0] <= start
        assert {place + len(t.encode()): t.strip() for place, t in read}.items() <= places.items()
        if name == "a.jsonl":  # not a document too early
            assert (tmp_path / name).read_bytes()[read[0][0] : start].count(b"\n") == 0


def test_beginning_inside_a_character_skips_it(tmp_path: Path) -> None:
    file = tmp_path / "wide.txt"
    file.write_text("é" * 1000, encoding="utf-8")
    for start in range(1, 1999, 37):
        ((place, text),) = open_source(file).placed(start)
        assert place == start + start % 2
        assert text == "é" * (1000 - place // 2)


def test_a_line_of_any_length_is_found_from_its_middle(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(texts, "BLOCK_BYTES", 8)
    rows = [{"text": "x" * num} for num in (3, 500, 0, 40)]
    source = open_source(write_jsonl(tmp_path / "a.jsonl", rows))
    begins = [0]
    for row in rows[:-1]:
        begins.append(begins[-1] + len(json.dumps(row)) + 1)
    for start in range(source.num_bytes or 0):
        wanted = max(begin for begin in begins if begin <= start)
        assert next(source.placed(start))[0] == wanted


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    write_jsonl(folder / "b.jsonl", [{"text": "second"}])
    (folder / "a.txt").write_text("first")
    (folder / "sub" / "c.md").write_text("third")
    (folder / "notes.pdf").write_bytes(b"\xff")
    (folder / ".hidden" / "d.txt").write_text("never")
    source = open_source(folder)
    assert "".join(source.pieces()) == "first\n\nsecond\n\nthird"
    assert source.num_bytes == sum(f.stat().st_size for f in folder.rglob("*.[tjm]*[tld]")) - 5
    assert "".join(text for _, text in source.placed(source.num_bytes - 1)) == "d"


def test_a_data_set_is_read_until_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        asked.append((args, options["split"]))

        def rows() -> Any:
            nonlocal read
            for i in range(10**6):
                read += 1
                yield {"text": f"line {i:06d} and so on"}

        return rows()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    tokens = calibration("org/name:en:validation", 4, 50)
    assert tokens.shape == (4, 50)
    assert asked == [(("org/name", "en"), "validation")]
    assert read < 12_000  # one block
    calibration("org/name", 4, 50)
    assert asked[1] == (("org/name", None), "train")


def test_sources_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: str | Path, match: str) -> None:
        with pytest.raises(CalibrationError, match=match):
            calibration(source, 1, 5)

    refused(tmp_path / "none.txt", "no file or folder")
    refused("none.jsonl", "no file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no text")
    (tmp_path / "latin.txt").write_bytes("é\n".encode("latin-1"))
    refused(tmp_path / "latin.txt", "not UTF-8")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    refused(tmp_path / "bad.jsonl", "not JSON, ending at byte 24")
    refused(write_jsonl(tmp_path / "c.jsonl", [{"body": "a", "id": 1}]), "its columns: body, id")
    refused(write_jsonl(tmp_path / "d.jsonl", [{"text": 7}]), "no text in a column 'text'")
    refused(write_jsonl(tmp_path / "e.jsonl", [["a"]]), "its columns: none")
    (tmp_path / "f.parquet").write_bytes(b"PAR0")
    refused(tmp_path / "f.parquet", "not a Parquet file")
    parquet = write_parquet(tmp_path / "g.parquet", ["a", None])
    refused(f"{parquet}#body", "its columns: text, other")
    refused(parquet, "no text in a column 'text'")
    (tmp_path / "nothing.txt").write_text("")
    refused(tmp_path / "nothing.txt", "0 tokens, needed are 5")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    refused("org/not-in-the-cache", "run with a network")


def test_damaged_text_is_refused_by_name(tmp_path: Path) -> None:
    def refused(name: str, content: bytes, match: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CalibrationError, match=match):
            "".join(open_source(tmp_path / name).pieces())

    refused("half.txt", "whole lines\né".encode()[:-1], "not UTF-8 text: unexpected end of data")
    refused("nul.txt", b"text\n" + bytes(100_000), "has a NUL byte")
    refused("list.json", b'[{"text": "a"}]', "one object a line, from files named .jsonl")
    refused("surrogate.jsonl", b'{"text": "a \\ud800 b"}', "not Unicode")
    refused("deep.jsonl", b"[" * 100_000, "not JSON")
    refused("null.jsonl", b'{"text": null}', "it holds null")
    refused("number.jsonl", b'{"text": 5}', "it holds 5")
    write_parquet(tmp_path / "page.parquet", [f"document {i}" * 50 for i in range(200)], 200)
    content = bytearray((tmp_path / "page.parquet").read_bytes())
    content[100:400] = bytes(300)
    refused("page.parquet", bytes(content), "cannot be read; it may be damaged")


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_the_current_folder(name: str) -> None:
    with pytest.raises(CalibrationError, match="name of a text is empty"):
        open_source(name)


@pytest.mark.parametrize("blank", [" ", "\n", " \n\t", "\u00a0\u3000"])
def test_blank_text_is_refused(blank: str, tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(blank * 9000, encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"blank\.txt is blank where sequences were taken"):
        load_tokens(tmp_path / "blank.txt", TOKENIZER, 4, 16, seed=0)


def test_sequences_held_out() -> None:
    """A quarter of those that are calibrated on, 8192 tokens at most, 16 sequences at least."""
    cases = {(512, 128): 64, (128, 128): 32, (16, 128): 16, (1024, 2048): 16}
    assert {case: held_out_of(*case) for case in cases} == cases
