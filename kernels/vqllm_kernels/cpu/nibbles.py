"""Code gf2 with AVX2: the index of a weight is looked up by 4 bits of its window at a time.

Parities are linear, so the index is the exclusive or of what the nibbles of the window lead to,
wherever they begin: the windows of the 4 columns of a row lie at different places of the same bits,
and each column has its own tables (vpshufb). So four registers of rows are decoded together. Their
windows are moved to the same place of an int32, and the bytes of 32 rows are gathered: byte k of
all rows is a register. A nibble of it is made once and serves all columns. At 2 bits a row of 4
columns is a byte, and 32 bytes of codes are such a register as they are stored.

    index   bits 0 to 3 where vpshufb takes them, bits 4, 5 and 6 in bits 7, 6 and 5
    table   vpshufb gives 0 where bit 7 is set. So parts of the table are taken where bit 7 is 0 of
            the index, or of the index with a number added: a | b, a ^ b, and so on of the upper
            bits a, b, c. Their exclusive or is the entry, 128 added: as many parts as there are
            pieces of 16 entries, and no choice between them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqllm_kernels.cpu.tiles import PIECE, Place, TileEmitter
from vqllm_kernels.cpu.vectors import Value, Vectors
from vqllm_kernels.trellis import reference_v2

TOGETHER = 4
"""Registers of rows that are decoded together."""
ORDER = (0, 2, 1, 3)
"""The column of each byte of a row: columns 0 and 1 are the even bytes."""
_UPPER = (7, 6, 5)
"""Where bits 4, 5 and 6 of the index are."""


@dataclass(frozen=True)
class _Variant:
    """What the index becomes before a part of the table is looked up."""

    of: Callable[[int], int]
    emit: Callable[[Vectors, Value], Value]


def _added(number: int) -> _Variant:
    return _Variant(
        lambda i: i + number & 255, lambda v, i: v.b.add(i, v.all_bytes(number)) if number else i
    )


def _added_up_to_255(number: int) -> _Variant:
    return _Variant(
        lambda i: min(i + number, 255), lambda v, i: v.add_saturating(i, v.all_bytes(number))
    )


VARIANTS = (
    _added(0),
    _Variant(lambda i: i & 15, lambda v, i: v.b.and_(i, v.all_bytes(15))),
    _added(0x40),
    _added_up_to_255(0x40),
    _added(0x20),
    _added(0x60),
    _added_up_to_255(0x20),
    _added_up_to_255(0x60),
)
"""Four of them serve 64 entries, all of them 128."""


def table(entries: Tensor) -> Tensor:
    """The parts that are looked up, uint8 [pieces of 16, 16], of int8 [64] or [128]."""
    pieces = (entries.view(-1, 16).int() + 128).tolist()
    number = len(pieces)
    upper = [_placed(16 * piece) for piece in range(number)]
    # Over GF(2): the piece is the sum of the parts whose variant has bit 7 clear.
    rows = [
        (sum((variant.of(bits) < 128) << k for k, variant in enumerate(VARIANTS[:number])), piece)
        for bits, piece in zip(upper, pieces, strict=True)
    ]
    for k in range(number):
        at = next(i for i in range(k, number) if rows[i][0] >> k & 1)
        rows[k], rows[at] = rows[at], rows[k]
        mask, values = rows[k]
        for i, (other, own) in enumerate(rows):
            if i != k and other >> k & 1:
                rows[i] = other ^ mask, [a ^ b for a, b in zip(own, values, strict=True)]
    return torch.tensor([values for _, values in rows], dtype=torch.uint8)


def _placed(index: int) -> int:
    """An index with its bits where they are looked up from."""
    return index & 15 | sum((index >> 4 + i & 1) << place for i, place in enumerate(_UPPER))


class Nibbles(TileEmitter):
    """An index of up to 7 bits, in bytes."""

    @property
    def together(self) -> int:
        return TOGETHER

    @property
    def rows_are_bytes(self) -> bool:
        """Whether every row of a piece ends where a byte of the ring does, one byte a row."""
        product = self.product
        return product.tile_cols == PIECE and product.tile_bytes == product.tile_rows

    def store(self, value: Value, column: Value, size: int, group: int) -> None:
        if not self.rows_are_bytes:
            return super().store(value, column, size, group)
        # 32 rows in their order are two halves of 16, of which each register has a part of 4.
        first = 8 * (group - group % TOGETHER) + 4 * (group % TOGETHER)
        for half, row in zip(self.v.halves(value), (first, first + 16), strict=True):
            self.v.store(half, column, size * row)
        return None

    def operands(self, tile: Value, places: Sequence[Place]) -> list[list[Value]]:
        v = self.v
        low, eight = v.all_words(255), v.all_words(8)
        found = []
        for weights in self._weights(tile, places):
            words = v.b.bitcast(weights, v.words)
            found.append([v.b.and_(words, low), v.b.lshr(words, eight)])
        return found

    def columns(self, tile: Value, places: Sequence[Place]) -> list[list[Value]]:
        v = self.v
        found = []
        for weights in self._weights(tile, places):
            signed = v.b.xor(v.b.bitcast(weights, v.ints), v.all_ints(0x80808080))
            moved = [v.b.shl(signed, v.all_ints(24 - 8 * byte)) for byte in ORDER]
            found.append([v.b.ashr(value, v.all_ints(24)) for value in moved])
        return found

    def _weights(self, tile: Value, places: Sequence[Place]) -> list[Value]:
        """Of each place a register of rows, four bytes each in the order of ORDER."""
        v = self.v
        columns = []
        for index in self._indices(tile, places):
            columns.append(self._look_up(index))
        first, second, third, fourth = columns
        found = []
        for high in (False, True):
            even = v.interleaved(first, third, 1, high)
            odd = v.interleaved(second, fourth, 1, high)
            found += [v.interleaved(even, odd, 2, False), v.interleaved(even, odd, 2, True)]
        return found

    def _look_up(self, index: Value) -> Value:
        v = self.v
        number = (1 << max(len(self.product.masks), 6)) // 16
        found = None
        for k, variant in enumerate(VARIANTS[:number]):
            part = v.twice(v.load(self.table, 16 * k, v.quarter))
            own = v.look_up_16(part, variant.emit(v, index))
            found = own if found is None else v.b.xor(found, own)
        return found

    def _indices(self, tile: Value, places: Sequence[Place]) -> list[Value]:
        """Of each column, of all rows: those of the first half of each place, then the others."""
        product = self.product
        if self.rows_are_bytes:
            first = places[0].group * self.v.lanes
            nibbles = self._nibbles(self._bytes_of_rows(tile, first))
            lags = [product.ends[PIECE - 1] - end for end in product.ends[:PIECE]]
            return [self._index(nibbles, lag) for lag in lags]
        ends = [self._ends(place) for place in places]
        lags = {tuple(own[-1] - end for end in own) for rows in ends for own in rows}
        [*every] = lags
        most = max(every[0]) + product.state_bits
        shift = max(-own[-1] % 8 for rows in ends for own in rows)
        if len(every) == 1 and most + shift <= 32:
            planes = self._planes(tile, [[own[-1] for own in rows] for rows in ends], most)
            return [self._index(planes, lag) for lag in every[0]]
        found = []
        for column in range(PIECE):
            last = [[own[column] for own in rows] for rows in ends]
            found.append(self._index(self._planes(tile, last, product.state_bits), 0))
        return found

    def _ends(self, place: Place) -> list[list[int]]:
        """Where the windows of each row end."""
        product, lanes = self.product, self.v.lanes
        rows = range(place.group * lanes, (place.group + 1) * lanes)
        first = [row * product.tile_cols + place.piece * PIECE for row in rows]
        return [product.ends[step : step + PIECE] for step in first]

    def _planes(self, tile: Value, ends: list[list[int]], bits: int) -> list[Value]:
        """The newest bits before the ends of all rows, as nibbles, the newest ones first."""
        product, v = self.product, self.v
        registers = []
        for rows in ends:
            last = [-(-end // 8) for end in rows]
            shifts = [8 * byte - end for byte, end in zip(last, rows, strict=True)]
            # The ring's bytes stand in words of 16 bits, the first one the high byte of its word.
            wanted = [[(byte - 1 - k) % product.tile_bytes ^ 1 for k in range(4)] for byte in last]
            if any(shifts):
                flat = [place for row in wanted for place in row]
                window = v.b.bitcast(v.pick_bytes(tile, product.tile_bytes, flat), v.ints)
                registers.append(v.bytes_in_fours(v.shift_right(window, shifts)))
            else:
                half = len(wanted) // 2
                flat = [
                    row[k]
                    for own in (wanted[:half], wanted[half:])
                    for k in range(4)
                    for row in own
                ]
                window = v.pick_bytes(tile, product.tile_bytes, flat)
                registers.append(v.b.bitcast(window, v.ints))
        first, second, third, fourth = registers
        planes = []
        for k in range(-(-bits // 8)):
            one = v.interleaved(first, second, 4, k > 1)
            other = v.interleaved(third, fourth, 4, k > 1)
            planes.append(v.interleaved(one, other, 8, k % 2 == 1))
        return self._nibbles(planes)

    def _bytes_of_rows(self, tile: Value, first: int) -> list[Value]:
        """Of 32 rows that are a byte each the bytes that end with their own, the newest first."""
        product, v = self.product, self.v
        size = product.tile_bytes
        before, own = (
            v.bytes_swapped(v.load(tile, at % size, v.bytes)) for at in (first - 32, first)
        )
        middle = v.middle(before, own)
        lag = product.ends[PIECE - 1] - product.ends[0]
        number = -(-(product.state_bits + lag) // 8)
        return [own, *(v.bytes_before(middle, own, k) for k in range(1, number))]

    def _nibbles(self, planes: list[Value]) -> list[Value]:
        """The lower and the upper 4 bits of all bytes of registers; what nothing uses is dropped by
        the compiler."""
        v = self.v
        low, found = v.all_bytes(15), []
        for plane in planes:
            upper = v.b.lshr(v.b.bitcast(plane, v.words), v.all_words(4))
            found += [v.b.and_(plane, low), v.b.and_(v.b.bitcast(upper, v.bytes), low)]
        return found

    def _index(self, planes: list[Value], lag: int) -> Value:
        """The index of the windows that end so many bits before the newest one."""
        product, v = self.product, self.v
        index = None
        for k, nibble in enumerate(planes):
            states = torch.arange(16) << 4 * k >> lag & (1 << product.state_bits) - 1
            own = [_placed(i) for i in reference_v2.indices(product.masks, states).tolist()]
            if any(own):
                found = v.look_up_16(v.constant_bytes(2 * own), nibble)
                index = found if index is None else v.b.xor(index, found)
        return v.all_bytes(0) if index is None else index
