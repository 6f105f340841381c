"""Symbols to a range-coded stream and back, with histograms that are stored beside it.

The symbols [R, n] are cut into cells: whole rows, or pieces of them, or columns. Every cell has a
class, and every class a histogram. Classes of few weights follow what the values of a row, of a
group that shares a scale, or of a column have in common, which is what the contexts of DeepCABAC
(Wiedemann et al., arXiv 1907.11900) adapt to; but as they are known before the first symbol, a
whole class is decoded by one call of a library.

    side       class of each cell, then −8 log2 p of each symbol in each class, a byte each; zlib
    stream     the symbols of class 0, of class 1, ... by a range coder
"""

import zlib
from dataclasses import dataclass

import numpy as np

from vqllm.archive.range_coder import range_decoded, range_encoded
from vqllm.archive.views import Symbols
from vqllm.core.protocols import JSON

PIECES = (0, 128, 64, 32)
"""Columns of a cell that is a piece of a row; 0 is the whole row."""
CLASSES = (1, 4, 12)
ROUNDS = 6
"""Of assigning cells to classes and counting again."""
MOST_COUNTS = 1 << 24
"""Cells times symbols of the alphabet, above which there is one class."""
LEAST_SHARE = 16
"""Symbols that a class must have for each of the alphabet, so that its histogram pays."""
ABSENT = 255


@dataclass(frozen=True)
class Cells:
    """How symbols are cut."""

    by_column: bool
    cols: int
    """of a piece of a row; the last one of a row may be shorter"""

    def number(self, rows: int, cols: int) -> np.ndarray:
        """The cell of each symbol, int64, to be broadcast over [R, n]."""
        if self.by_column:
            return np.arange(cols)[None]
        pieces = -(-cols // self.cols)
        return np.arange(rows)[:, None] * pieces + np.arange(cols)[None] // self.cols

    def count(self, rows: int, cols: int) -> int:
        """How many there are."""
        return cols if self.by_column else rows * -(-cols // self.cols)


@dataclass(frozen=True)
class Model:
    """Cells, the class of each, and of each class −8 log2 p of each symbol, uint8 [classes, A]."""

    cells: Cells
    classes: np.ndarray
    tables: np.ndarray
    bits: float
    """that the symbols are expected to take, header included"""


def one_class(symbols: Symbols) -> Model:
    """The model with a single histogram."""
    return _fitted(symbols, Cells(False, symbols.shape[1]), 1, int(symbols.max()) + 1)


def fitted(symbols: Symbols, like: Model | None = None) -> Model:
    """The model of the fewest bits among those that are tried.

    Args:
        like: of other rows of the tensor: its cells and its number of classes are taken.
    """
    rows, cols = symbols.shape
    alphabet = int(symbols.max()) + 1
    if like is not None:
        return _fitted(symbols, like.cells, len(like.tables), alphabet)
    shapes = [Cells(False, piece or cols) for piece in PIECES if piece < cols]
    best = one_class(symbols)
    for cells in [*shapes, Cells(True, 0)]:
        num_cells = cells.count(rows, cols)
        for number in CLASSES[1:]:
            is_small = num_cells < 2 * number or symbols.size < LEAST_SHARE * alphabet * number
            if is_small or num_cells * alphabet > MOST_COUNTS:
                continue
            tried = _fitted(symbols, cells, number, alphabet)
            best = min(best, tried, key=lambda model: model.bits)
    return best


def _fitted(symbols: Symbols, cells: Cells, number: int, alphabet: int) -> Model:
    """Cells to classes by turns: each cell in the class whose histogram codes it with the fewest
    bits, then histograms of what is in each class."""
    rows, cols = symbols.shape
    num_cells = cells.count(rows, cols)
    if number == 1:
        counts = np.bincount(symbols.reshape(-1), minlength=alphabet)[None]
        classes = np.zeros(num_cells, np.uint8)
    else:
        index = cells.number(rows, cols) * alphabet + symbols
        counts_CA = np.bincount(index.reshape(-1), minlength=num_cells * alphabet)
        counts_CA = counts_CA.reshape(num_cells, alphabet).astype(np.float32)
        # The first classes are of equal size, by how far values are from the middle one.
        far = np.abs(np.arange(alphabet) - alphabet / 2).astype(np.float32)
        spread = counts_CA @ far / np.maximum(counts_CA.sum(1), 1)
        order = np.argsort(spread, kind="stable")
        classes = np.empty(num_cells, np.uint8)
        classes[order] = np.arange(num_cells) * number // num_cells
        for _ in range(ROUNDS):
            counts = _by_class(counts_CA, classes, number)
            classes = (counts_CA @ _bits(counts + 0.05).T).argmin(1).astype(np.uint8)
        counts = _by_class(counts_CA, classes, number)
    tables = _tables(counts)
    bits = float((counts * _bits(weights(tables))).sum())
    sizes = np.bincount(classes, minlength=number)
    bits += float((sizes * _bits(sizes[None] + 1)[0]).sum())
    bits += 8 * len(zlib.compress(tables.tobytes()))
    return Model(cells, classes, tables, bits)


def _by_class(counts_CA: np.ndarray, classes: np.ndarray, number: int) -> np.ndarray:
    one_hot = (classes[None] == np.arange(number)[:, None]).astype(np.float32)
    return one_hot @ counts_CA


def _bits(weights_KA: np.ndarray) -> np.ndarray:
    """−log2 p of weights that need not add up to 1."""
    total = weights_KA.sum(1, keepdims=True)
    return -np.log2(np.maximum(weights_KA, 1e-9) / np.maximum(total, 1e-9)).astype(np.float32)


def _tables(counts: np.ndarray) -> np.ndarray:
    codes = np.clip(np.rint(8 * _bits(counts)), 0, ABSENT - 1)
    return np.where(counts > 0, codes, ABSENT).astype(np.uint8)


def weights(tables: np.ndarray) -> np.ndarray:
    """What the range coder makes histograms of: whole numbers, so that every machine has the same;
    at most 2^24, which float32 holds, and at least 1."""
    exact = np.rint(2.0 ** (24 - np.arange(ABSENT + 1) / 8))
    return np.maximum(exact, 1)[tables]


def encoded(symbols: Symbols, model: Model) -> tuple[JSON, bytes]:
    """What is to be known of the stream, and side and stream."""
    order, sizes = _order(model.cells, model.classes, len(model.tables), *symbols.shape)
    by_class = np.split(symbols.reshape(-1)[order], np.cumsum(sizes)[:-1])
    side = zlib.compress(model.classes.tobytes() + model.tables.tobytes(), 9)
    stream = range_encoded(by_class, weights(model.tables))
    about = {
        "by_column": model.cells.by_column,
        "cols": model.cells.cols,
        "classes": len(model.tables),
        "alphabet": model.tables.shape[1],
        "bytes": [len(side), len(stream)],
    }
    return about, side + stream


def decoded(about: JSON, data: bytes, rows: int, cols: int) -> Symbols:
    """The symbols [rows, cols] of `encoded`. ValueError where the data cannot be of them."""
    cells, number = Cells(about["by_column"], about["cols"]), about["classes"]
    side = zlib.decompress(data[: about["bytes"][0]])
    num_cells = cells.count(rows, cols)
    classes = np.frombuffer(side[:num_cells], np.uint8)
    tables = np.frombuffer(side[num_cells:], np.uint8).reshape(number, about["alphabet"])
    order, sizes = _order(cells, classes, number, rows, cols)
    symbols = np.empty(rows * cols, np.uint16)
    found = range_decoded(data[about["bytes"][0] :], sizes, weights(tables))
    symbols[order] = np.concatenate(found)
    return symbols.reshape(rows, cols)


def _order(
    cells: Cells, classes: np.ndarray, number: int, rows: int, cols: int
) -> tuple[np.ndarray, list[int]]:
    """The places of the symbols, those of class 0 first, and how many each class has."""
    of_symbol = classes[cells.number(rows, cols)]
    of_symbol = np.broadcast_to(of_symbol, (rows, cols)).reshape(-1)
    order = np.argsort(of_symbol, kind="stable")
    return order, np.bincount(of_symbol, minlength=number).tolist()
