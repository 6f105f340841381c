"""Tiles of a trellis in registers: what the kernels of its codes have in common.

A register holds a piece of 4 columns of 16 (or 8) rows of a tile. The windows of their states are
picked from the codes as they are stored; a code says how they become weights (`byte_sums`,
`parities`); products of integers sum them up. Nothing is rounded, so every set of instructions has
the same sums, and so have one row of x and many.

    bytes   q = 256 hi + lo, two vpdpbusd a register and row of x, with 128 added to weights that
            are signed bytes, which costs a constant a row of x
    words   two weights of a register are int16, one product a row of x

Source: the layout is that of `vqllm_kernels.trellis.reference`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from vqllm_kernels.cpu.activations import LARGEST
from vqllm_kernels.cpu.instructions import Instructions
from vqllm_kernels.cpu.vectors import Value, Vectors
from vqllm_kernels.trellis import reference, reference_v3

PIECE = 4
"""Columns of a register."""
REGISTERS = {"avx512": 16, "avx2": 8}
"""Registers for sums: about half of what there are."""
AHEAD = 4096
"""Bytes of codes that are asked for ahead: 4096 x 4096 at 2 bits out of memory takes 0.66 ms so,
0.72 with 1024 and 1.75 with 256."""
PARITIES = "gf2"
"""The code whose weights are entries of a table of int8."""


@dataclass(frozen=True)
class TileProduct:
    """What a kernel is compiled for."""

    instructions: Instructions
    code: str
    tile_rows: int
    tile_bits: int
    state_bits: int
    rows: int
    """Rows of x."""
    masks: tuple[int, ...] = ()
    """Of code gf2."""
    places: tuple[int, ...] = ()
    """Those of trellis-v3; () is the order of a ring along the rows."""

    @property
    def key(self) -> str:
        """The fields as a text, a constant for the compiler."""
        *fields, masks, places = vars(self).values()
        lists = (",".join(map(str, own)) for own in (masks, places))
        return "/".join([*map(str, fields), *lists])

    @classmethod
    def of(cls, key: str) -> "TileProduct":
        instructions, code, *numbers, masks, places = key.split("/")
        lists = (tuple(int(n) for n in own.split(",") if n) for own in (masks, places))
        return cls(instructions, code, *map(int, numbers), *lists)  # type: ignore[arg-type]

    @property
    def step_weights(self) -> int:
        """Weights of a state."""
        return reference.WEIGHTS_OF_STEP.get(self.code, 1)

    @property
    def tile_cols(self) -> int:
        return reference.WEIGHTS // self.tile_rows

    @property
    def tile_bytes(self) -> int:
        return self.tile_bits // 8

    @property
    def is_bytes(self) -> bool:
        """Whether x comes as bytes; else as words."""
        return self.instructions == "avx512" and (self.rows == 1 or self.code == PARITIES)

    @property
    def operand_columns(self) -> int:
        """Columns of an int32 of x."""
        if self.code == PARITIES:
            return 4 if self.is_bytes else 2
        if self.in_words:
            return 2 * self.step_weights
        return 2 if self.instructions == "portable" else self.step_weights

    @property
    def in_words(self) -> bool:
        """Whether two states stand in an int32, of codes that multiply them."""
        if self.instructions != "avx512" or self.code not in reference.MULTIPLIERS:
            return False
        return self.code not in reference.ADDENDS and (self.is_bytes or self.step_weights == 1)

    @property
    def parts(self) -> int:
        """Operands: the high and the low bytes of each row of x, or its words."""
        return 2 * self.rows if self.is_bytes else self.rows

    @property
    def steps(self) -> int:
        """int32 of x for a row of a tile."""
        return self.tile_cols // self.operand_columns

    @property
    def most_tiles(self) -> int:
        """Tiles that sums of int32 are safe for.

        A byte of a weight adds at most 255 · 128 in bytes; in words at most 128 · 32512, if it is
        unsigned 255 · 32512. An int32 of x meets four of them, or those of two states, or two
        entries of a table.
        """
        is_signed = not self.is_bytes and self.code not in (*reference.UNSIGNED, PARITIES)
        byte = 128 if is_signed else 255
        most = (
            (2 if self.code == PARITIES and not self.is_bytes else 4)
            * byte
            * (128 if self.is_bytes else LARGEST)
            * (2 if self.in_words else 1)
        )
        return ((1 << 31) - 1) // (most * self.steps)

    @cached_property
    def ends(self) -> list[int]:
        """Where the window of each state ends, by its place in the tile."""
        ends = reference.step_ends(self.tile_bits, reference.WEIGHTS // self.step_weights)
        return [ends[t] for t in reference_v3.step_of_place(self.places)] if self.places else ends


@dataclass(frozen=True)
class Place:
    """A register of a tile."""

    group: int
    """Of so many rows as there are lanes."""
    piece: int
    """Of PIECE columns."""


class TileEmitter(ABC):
    """Writes the instructions of kernels of one code."""

    def __init__(self, product: TileProduct, vectors: Vectors, table: Value) -> None:
        """`table` is the address of what the code looks up, if anything."""
        self.product, self.v, self.table = product, vectors, table

    @property
    def together(self) -> int:
        """Pieces that are decoded together."""
        return 1

    @abstractmethod
    def operands(self, tile: Value, places: Sequence[Place]) -> list[list[Value]]:
        """The weights of pieces as they are multiplied, a register for each int32 of x, or several
        in turn."""

    @abstractmethod
    def columns(self, tile: Value, places: Sequence[Place]) -> list[list[Value]]:
        """The weights of pieces as int32, a register for each of their 4 columns."""

    def store(self, value: Value, column: Value, size: int, group: int) -> None:
        """Write numbers of so many bytes of a group of rows to their places in a column."""
        self.v.store(value, column, size * group * self.v.lanes)

    def sums(self, codes: Value, num_tiles: Value, operand: Sequence[Value], out: Value) -> None:
        product, lanes = self.product, self.v.lanes
        groups = product.tile_rows // lanes
        pieces = product.tile_cols // PIECE
        # As many groups of rows at a time as there are registers for their sums.
        most = max(1, REGISTERS[product.instructions] // product.parts)
        step = max(1, min(groups, most), self.together // pieces)
        for first in range(0, groups, step):
            chosen = range(first, min(first + step, groups))
            apart = len(chosen) * pieces * product.parts <= REGISTERS[product.instructions]
            self._groups(codes, num_tiles, operand, out, chosen, pieces if apart else 1)

    def decode(self, tile: Value, out: Value, apart: Value, numbers: Value) -> None:
        """The weights of a tile, a column after the other."""
        product, v = self.product, self.v
        for line in range(0, product.tile_bytes, 64):
            v.prefetch(tile, AHEAD + line)
        factors = [v.spread_float(numbers, 4 * i) for i in range(2)]
        addends = [v.spread_float(numbers, 8 + 4 * i) for i in range(2)]
        for places in self._batches(range(product.tile_rows // v.lanes)):
            for place, columns in zip(places, self.columns(tile, places)):
                for i, value in enumerate(columns):
                    weight = v.times_plus(value, factors[i & 1], addends[i & 1])
                    column = v.step(out, apart, place.piece * PIECE + i)
                    self.store(v.as_bfloat16(weight), column, 2, place.group)

    def _batches(self, groups: Sequence[int]) -> list[list[Place]]:
        """The pieces of some groups of rows, those that are decoded together in one list."""
        pieces = range(self.product.tile_cols // PIECE)
        every = [Place(group, piece) for piece in pieces for group in groups]
        return [every[i : i + self.together] for i in range(0, len(every), self.together)]

    def _groups(
        self,
        codes: Value,
        num_tiles: Value,
        operand: Sequence[Value],
        out: Value,
        groups: Sequence[int],
        chains: int,
    ) -> None:
        """The sums of some groups of rows; with several chains, one for each piece of columns."""
        product, v = self.product, self.v
        parts, steps = product.parts, PIECE // product.operand_columns
        add = v.add_bytes_products if product.is_bytes else v.add_word_products
        sums = {(group, chain): v.zeros(parts) for group in groups for chain in range(chains)}

        def tile(j: Value) -> None:
            own = v.b.add(codes, v.b.mul(j, v.int64(product.tile_bytes)))
            first = v.b.mul(j, v.int64(4 * product.steps))
            x = [v.b.add(part, first) for part in operand]
            for line in range(0, product.tile_bytes, 64):
                v.prefetch(own, AHEAD + line)
            for places in self._batches(groups):
                for place, every in zip(places, self.operands(own, places)):
                    for s, weights in enumerate(every):
                        at = 4 * (place.piece * steps + s * steps // len(every))
                        for total, part in zip(sums[place.group, place.piece % chains], x):
                            v.b.store(add(v.b.load(total), weights, v.spread(part, at)), total)

        v.loop(num_tiles, tile)
        for group in groups:
            for part in range(parts):
                total = v.b.load(sums[group, 0][part])
                for chain in range(1, chains):
                    total = v.b.add(total, v.b.load(sums[group, chain][part]))
                self.store(total, v.step(out, v.int64(4 * product.tile_rows), part), 4, group)

    def states(self, tile: Value, group: int, piece: int) -> list[Value]:
        """The states of the steps of a piece of columns, a register each."""
        product, v = self.product, self.v
        steps = PIECE // product.step_weights
        row_steps = product.tile_cols // product.step_weights
        mask = v.all_ints((1 << product.state_bits) - 1)
        lanes = range(v.lanes)

        def ends(s: int) -> list[int]:
            rows = [(group * v.lanes + lane) * row_steps + piece * steps for lane in lanes]
            return [product.ends[row + s] for row in rows]

        def window(last: Sequence[int]) -> Value:
            # The ring's bytes stand in words of 16 bits, the first one the high byte of its word.
            places = [
                ((-(-end // 8) - 1 - b) % product.tile_bytes) ^ 1 for end in last for b in range(4)
            ]
            return v.b.bitcast(v.pick_bytes(tile, product.tile_bytes, places), v.ints)

        last = ends(steps - 1)
        shifts = [[-(-b // 8) * 8 - a for a, b in zip(ends(s), last)] for s in range(steps)]
        shared = max(map(max, shifts)) + product.state_bits <= 32
        words = window(last) if shared else None
        states = []
        for s in range(steps):
            if words is None:
                own = ends(s)
                word, shift = window(own), [-end % 8 for end in own]
            else:
                word, shift = words, shifts[s]
            states.append(v.b.and_(v.shift_right(word, shift), mask))
        return states

    def state_pairs(self, tile: Value, group: int, piece: int) -> list[Value]:
        """The same, two steps in the words of every int32, the first one low; "avx512" only.

        A window of 64 bits holds the states of two rows that are neighbours in the ring, or each of
        its halves those of one row; vpmultishiftqb takes them out.
        """
        product, v = self.product, self.v
        steps = PIECE // product.step_weights
        row_steps = product.tile_cols // product.step_weights
        rows = range(group * v.lanes, (group + 1) * v.lanes)
        ends = [
            [product.ends[r * row_steps + piece * steps + s] for s in range(steps)] for r in rows
        ]
        together = 2 if product.tile_cols == PIECE else 1
        width = 4 * together

        def last(lane: int, s: int) -> int:
            """The byte behind a window's end."""
            return -(-ends[lane - lane % together + together - 1][s] // 8)

        def shift(lane: int, s: int, stop: int) -> int:
            half = 0 if together == 2 else 32 * (lane % 2)
            return half + 8 * last(lane, stop) - ends[lane][s]

        lanes = range(v.lanes)
        shared = all(
            8 * last(lane, steps - 1) - ends[lane][0] + product.state_bits <= 8 * width
            for lane in lanes
        )
        mask = (1 << product.state_bits) - 1
        found, ring = [], None
        for s in range(0, steps, 2):
            stop = steps - 1 if shared else s + 1
            if ring is None or not shared:
                places = [
                    ((last(lane, stop) - 1 - b) % product.tile_bytes) ^ 1
                    for lane in range(0, v.lanes, together)
                    for b in range(width)
                ]
                ring = v.pick_bytes(tile, product.tile_bytes, places)
            starts = [
                shift(lane, step, stop) + 8 * byte
                for lane in lanes
                for step in (s, s + 1)
                for byte in (0, 1)
            ]
            states = v.b.bitcast(v.bits_from(ring, starts), v.ints)
            found.append(v.b.and_(states, v.all_ints(mask | mask << 16)))
        return found
