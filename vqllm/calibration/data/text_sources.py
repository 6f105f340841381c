"""Text for calibration and evaluation: files, folders of files, and data sets of the hub.

A source is read as pieces; joined together, they are its text. A plain file's pieces are cut after
line ends. The documents of a structured file, and the files of a folder, have a blank line between
them, as papers join the rows of WikiText. `placed(start)` begins with the document at the byte
`start` and does not read the bytes before it, so a few sequences out of 50 GB cost a few reads.
"""

import codecs
import json
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vqllm.core import path_names
from vqllm.errors import CalibrationError

BETWEEN_DOCUMENTS = "\n\n"
BLOCK_BYTES = 1 << 14
STRUCTURED = (".jsonl", ".parquet")
PLAIN = (".txt", ".md", ".rst", ".raw")


class TextSource(ABC):
    """Something that text can be read from. All errors are CalibrationError."""

    name: str

    @property
    @abstractmethod
    def num_bytes(self) -> int | None:
        """Bytes of the source, about those of its text. None if they are not known before all is
        read; `start` must then be 0."""

    @abstractmethod
    def placed(self, start: int = 0) -> Iterator[tuple[int, str]]:
        """The text from the document at the byte `start` < `num_bytes` of the source on; a plain
        text from that byte itself. Pieces are joined without a separator.

        Each piece comes with the byte of the source at which it begins, whatever `start` is.
        """

    def pieces(self) -> Iterator[str]:
        """All of the text, to be joined without a separator."""
        return (text for _, text in self.placed())


def open_source(source: str | Path) -> TextSource:
    """The source that a user named.

    Args:
        source: a file (`.jsonl` and `.parquet` hold documents in a column `text`, or the one named
            after `#`, as in `data.jsonl#content`; anything else is plain UTF-8 text), a folder of
            such files, or a data set of the hub as `id`, `id:config` or `id:config:split`
            (`#column` likewise; the split is `train` by default).

    Raises:
        CalibrationError: nothing of that name, a folder without text, or a kind of file that is not
            read.
    """
    name, column = str(source), "text"
    if not name.strip():
        raise CalibrationError(
            "the name of a text is empty: pass a file, a folder (. is the current one) or a data "
            "set's id."
        )
    if (problem := path_names.problem(name)) is not None:
        raise CalibrationError(
            f"{path_names.shown(name)} cannot be a text: {problem}. Give it another name."
        )
    # A file whose own name has a "#" goes before a column.
    if not Path(name).expanduser().exists() and "#" in name:
        name, column = name.rsplit("#", 1)
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(path, column)
    if path.is_file():
        return _file(path, column)
    # What looks like a path is never taken for a data set of the hub.
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix in STRUCTURED + PLAIN:
        if path.exists():
            raise CalibrationError(f"{name} is no ordinary file: pass a text file or a folder.")
        raise CalibrationError(f"there is no file or folder {name}.")
    return HubDataset(name, column)


def _file(path: Path, column: str) -> TextSource:
    if path.suffix == ".jsonl":
        return JsonLines(str(path), column)
    if path.suffix == ".parquet":
        return Parquet(str(path), column)
    if path.suffix == ".json":
        raise CalibrationError(
            f"{path}: JSON is read as one object a line, from files named .jsonl. Rename the file "
            f"if it is that; make lines of a list with: jq -c '.[]' {path.name} > text.jsonl"
        )
    return PlainText(str(path))


def _folder(path: Path, column: str) -> TextSource:
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix in STRUCTURED + PLAIN
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise CalibrationError(
            f"{path} holds no text: a folder's {', '.join(PLAIN + STRUCTURED)} files are read."
        )
    return Folder(str(path), tuple(_file(file, column) for file in files))


class _File(TextSource):
    @property
    def path(self) -> Path:
        return Path(self.name)

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True)
class PlainText(_File):
    """One UTF-8 file."""

    name: str

    def placed(self, start: int = 0) -> Iterator[tuple[int, str]]:
        decoder = codecs.getincrementaldecoder("utf-8")("strict")
        with _reading(self.path), self.path.open("rb") as file:
            file.seek(start)
            while start and (byte := file.peek(1)[:1]) and 0x80 <= byte[0] < 0xC0:
                file.read(1)  # inside a character
            place, rest = file.tell(), ""
            while True:
                block = file.read(BLOCK_BYTES)
                try:
                    rest += decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    raise CalibrationError(
                        f"{self.path} is not UTF-8 text: {error.reason} near byte {file.tell()}."
                    ) from error
                if b"\0" in block:
                    raise CalibrationError(
                        f"{self.path} is not plain text: it has a NUL byte before byte "
                        f"{file.tell()}. Pass a text file in UTF-8."
                    )
                if not block:
                    break
                # Up to the last line end; a block without one is a piece as it is.
                cut = rest.rfind("\n") + 1 or len(rest)
                yield place, rest[:cut]
                place += len(rest[:cut].encode())
                rest = rest[cut:]
        if rest:
            yield place, rest


@dataclass(frozen=True)
class JsonLines(_File):
    """A JSON object on each line."""

    name: str
    column: str

    def placed(self, start: int = 0) -> Iterator[tuple[int, str]]:
        with _reading(self.path), self.path.open("rb") as file:
            file.seek(_begin_of_line(file, start))
            yield from _with_blank_lines(self._documents(file))

    def _documents(self, file: BinaryIO) -> Iterator[tuple[int, str]]:
        place = file.tell()
        while line := file.readline():
            begin, place = place, place + len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CalibrationError(
                    f"{self.path} holds a line that is not JSON, ending at byte {file.tell()}: "
                    f"{error}."
                ) from error
            yield begin, text_of(row, self.column, self.name)


def _begin_of_line(file: BinaryIO, place: int) -> int:
    """Where the line begins that the byte `place` is in."""
    end = place
    while end:
        begin = max(0, end - BLOCK_BYTES)
        file.seek(begin)
        line_end = file.read(end - begin).rfind(b"\n")
        if line_end >= 0:
            return begin + line_end + 1
        end = begin
    return 0


@dataclass(frozen=True)
class Parquet(_File):
    """A Parquet file, read a few rows at a time."""

    name: str
    column: str

    @property
    def num_bytes(self) -> int:
        metadata = self._open().metadata
        return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))

    def placed(self, start: int = 0) -> Iterator[tuple[int, str]]:
        import pyarrow

        file = self._open()
        if self.column not in file.schema_arrow.names:
            raise CalibrationError(no_column(self.name, self.column, file.schema_arrow.names))
        # Rows count as equally long, because the file does not say how many bytes each has.
        num_rows, num_bytes = file.metadata.num_rows, self.num_bytes
        first = start * num_rows // max(1, num_bytes)
        with _reading(self.path, pyarrow.ArrowException):
            yield from _with_blank_lines(
                (row * num_bytes // num_rows, text)
                for row, text in enumerate(self._documents(file, first), first)
            )

    def _documents(self, file: Any, skip: int) -> Iterator[str]:
        # Whole row groups before the first row are skipped without reading them.
        for group in range(file.metadata.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if skip >= num_rows:
                skip -= num_rows
                continue
            for batch in file.iter_batches(64, row_groups=[group], columns=[self.column]):
                for value in batch.column(0).to_pylist()[skip:]:
                    yield text_of({self.column: value}, self.column, self.name)
                skip = max(0, skip - batch.num_rows)

    def _open(self) -> Any:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        try:
            return ParquetFile(self.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise CalibrationError(f"{self.path} is not a Parquet file: {error}") from error


@dataclass(frozen=True)
class Folder(TextSource):
    """Files one after the other, in the order of their names."""

    name: str
    files: tuple[TextSource, ...]

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes())

    def _sizes(self) -> list[int]:
        return [file.num_bytes or 0 for file in self.files]

    def placed(self, start: int = 0) -> Iterator[tuple[int, str]]:
        separator, begin = "", 0
        for file, size in zip(self.files, self._sizes()):
            if start < begin + size:
                if separator:
                    yield begin - len(separator), separator
                for place, text in file.placed(max(0, start - begin)):
                    yield begin + place, text
                separator = BETWEEN_DOCUMENTS
            begin += size


@dataclass(frozen=True)
class HubDataset(TextSource):
    """A data set by its id, from its first row on: streamed, or from the local cache offline."""

    name: str
    column: str

    @property
    def num_bytes(self) -> None:
        return None

    def placed(self, start: int = 0) -> Iterator[tuple[int, str]]:
        if start:
            raise ValueError("a streamed data set is read from its beginning")
        yield from _with_blank_lines(self._documents())

    def _documents(self) -> Iterator[tuple[int, str]]:
        import datasets
        from datasets import config as settings

        # Streaming needs the network; offline the data set must be in the local cache.
        identifier, configuration, split = (*self.name.split(":"), "", "")[:3]
        streaming = not (settings.HF_HUB_OFFLINE or settings.HF_DATASETS_OFFLINE)
        try:
            rows = datasets.load_dataset(
                identifier, configuration or None, split=split or "train", streaming=streaming
            )
            place = 0
            for row in rows:
                text = text_of(row, self.column, self.name)
                yield place, text
                place += len(text.encode())
        except (OSError, ValueError, RuntimeError) as error:
            raise CalibrationError(
                f"there is no file or folder {identifier!r}, and as a data set of the hub it "
                f"cannot be read: {error} Pass a local file or folder, or run with a network; a "
                "configuration and a split are named as id:config:split."
            ) from error


@contextmanager
def _reading(path: Path, *others: type[Exception]) -> Iterator[None]:
    """Turn errors of reading a file, and `others`, into CalibrationError."""
    try:
        yield
    except (OSError, UnicodeDecodeError, *others) as error:
        raise CalibrationError(f"{path} cannot be read; it may be damaged: {error}") from error


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded. Halves of surrogate pairs, which can come from JSON and the
    command line, cannot, and no tokenizer accepts them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _with_blank_lines(documents: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    separator = ""
    for place, document in documents:
        yield place - len(separator), separator + document
        separator = BETWEEN_DOCUMENTS


def text_of(row: Any, column: str, name: str) -> str:
    """The text of a document. CalibrationError with what is there if it is no text."""
    if not isinstance(row, dict) or column not in row:
        raise CalibrationError(no_column(name, column, list(row) if isinstance(row, dict) else []))
    value = row[column]
    if not isinstance(value, str):
        shown = "null" if value is None else reprlib.repr(value)
        raise CalibrationError(
            f"{name} has no text in a column {column!r} of one of its documents: it holds {shown}. "
            f"Leave such documents out, or name another column as {name}#COLUMN."
        )
    if not is_unicode(value):
        raise CalibrationError(
            f"{name} has a document that is not Unicode, with half of a surrogate pair: "
            f"{reprlib.repr(value)}. Correct it or leave it out."
        )
    return value


def no_column(name: str, column: str, columns: list[str]) -> str:
    return (
        f"{name} has no text in a column {column!r}; its columns: {', '.join(columns) or 'none'}. "
        f"Name another one as {name}#COLUMN."
    )
