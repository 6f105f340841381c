"""Code gf2: bits of the index are parities of bits of the state, the weight is an entry of a table.

With AVX-512 the newest and the older 8 bits of the windows of 64 weights are taken out of the ring
by vpmultishiftqb, a product of bits with a matrix over GF(2) gives their part of the index
(vgf2p8affineqb), and vpermb looks up the table: nine instructions for 64 weights and a row of x, at
every rate. With AVX2 the parts of the index are looked up by 4 bits of the state (vpshufb).
"""

from collections.abc import Sequence

from vqllm_kernels.cpu.tiles import AHEAD, PIECE, TileEmitter
from vqllm_kernels.cpu.vectors import Value
from vqllm_kernels.trellis import reference_v2

COLUMNS = (0, 2, 1, 3)
"""With AVX2: the byte of each column, and the column of each byte."""
BY_COLUMNS = [
    4 * row + column
    for first in (0, 1)
    for rows in (range(8), range(8, 16))
    for column in (first, first + 2)
    for row in rows
]
"""With AVX-512: bytes of 16 rows of 4 columns, a column in halves of 8 rows, so that joining bytes
within quarters of a register brings columns 0 and 1 together, and 2 and 3."""
HALVES = [
    [
        byte + 64 * part
        for q in range(4)
        for byte in range(16 * q + start, 16 * q + start + 8)
        for part in range(2)
    ]
    for start in (0, 8)
]
"""Bytes of two registers in turn, from the lower and from the upper half of each quarter."""


class Parities(TileEmitter):
    """An index of up to 7 bits, in bytes."""

    def operands(self, tile: Value, group: int, piece: int) -> list[Value]:
        v = self.v
        weights = self._weights(tile, group, piece)
        if self.product.is_bytes:
            return [v.b.xor(weights, v.all_ints(0x80808080))]
        return v.word_pairs(weights)

    def columns(self, tile: Value, group: int, piece: int) -> list[Value]:
        v = self.v
        weights = self._weights(tile, group, piece)
        places = range(PIECE) if v.wide else COLUMNS
        return [
            v.b.ashr(v.b.shl(weights, v.all_ints(24 - 8 * place)), v.all_ints(24))
            for place in places
        ]

    def decode(self, tile: Value, out: Value, apart: Value, numbers: Value) -> None:
        """With AVX-512 the table has the bytes of each weight in bfloat16 (`panel_table`): two
        look-ups for 64 weights in place of conversions. 4096 x 4096 take 2 ms so, 3 without."""
        product, v = self.product, self.v
        if not v.wide:
            return super().decode(tile, out, apart, numbers)
        for line in range(0, product.tile_bytes, 64):
            v.prefetch(tile, AHEAD + line)
        low, high = self._entries(0), self._entries(1)
        for piece in range(product.tile_cols // PIECE):
            for group in range(product.tile_rows // v.lanes):
                index = v.shuffled(self._index_of_bits(tile, group, piece), BY_COLUMNS)
                bytes_of = v.look_up(low, index), v.look_up(high, index)
                for half, pair in enumerate(HALVES):
                    both = v.joined(*bytes_of, pair)
                    for i in range(2):
                        place = v.step(out, apart, piece * PIECE + 2 * half + i)
                        v.store(v.half(both, i), place, 2 * group * v.lanes)

    def _entries(self, number: int) -> list[Value]:
        """One of the tables that lie one behind the other, in registers of 64 entries."""
        v = self.v
        registers = (1 << max(len(self.product.masks), 6)) // 64
        return [
            v.load(self.table, 64 * (registers * number + i), v.bytes) for i in range(registers)
        ]

    def _weights(self, tile: Value, group: int, piece: int) -> Value:
        """Four int8 of a row in every int32, with AVX2 in the order of COLUMNS."""
        v = self.v
        index = (self._index_of_bits if v.wide else self._index)(tile, group, piece)
        entries = 1 << max(len(self.product.masks), 6)
        table = [
            v.load(self.table, 64 * i if v.wide else 16 * i, v.bytes if v.wide else v.quarter)
            for i in range(entries // (64 if v.wide else 16))
        ]
        return v.b.bitcast(v.look_up(table, index), v.ints)

    def _index_of_bits(self, tile: Value, group: int, piece: int) -> Value:
        product, v = self.product, self.v
        # Windows that a product of 64 bits takes from: of two rows that are neighbours in the ring,
        # or of one row in each half.
        rows_together = 2 if product.tile_cols == PIECE else 1
        width = 4 * rows_together
        shifts, places = [], []
        for first in range(0, v.lanes, rows_together):
            rows = range(group * v.lanes + first, group * v.lanes + first + rows_together)
            ends = [
                product.ends[row * product.tile_cols + piece * PIECE + c]
                for row in rows
                for c in range(PIECE)
            ]
            last = -(-ends[-1] // 8)
            places += [((last - 1 - b) % product.tile_bytes) ^ 1 for b in range(width)]
            half = 32 * (first % 2) if rows_together == 1 else 0
            shifts += [half + 8 * last - end for end in ends]
        ring = v.pick_bytes(tile, product.tile_bytes, places)
        index = None
        for byte in range(-(-product.state_bits // 8)):
            bits = v.bits_from(ring, [shift + 8 * byte for shift in shifts])
            matrix = 0
            for i, mask in enumerate(product.masks):
                matrix |= (mask >> 8 * byte & 255) << 8 * (7 - i)
            own = v.times_matrix(bits, matrix)
            index = own if index is None else v.b.xor(index, own)
        return index

    def _index(self, tile: Value, group: int, piece: int) -> Value:
        v = self.v
        low_bytes, high_bytes = v.all_ints(0x00FF00FF), v.all_ints(0xFF00FF00)
        eight, sixteen = v.all_ints(8), v.all_ints(16)
        a, b, c, d = self.states(tile, group, piece)
        first = v.b.or_(a, v.b.shl(b, sixteen))
        second = v.b.or_(c, v.b.shl(d, sixteen))
        low = v.b.or_(v.b.and_(first, low_bytes), v.b.shl(v.b.and_(second, low_bytes), eight))
        high = v.b.or_(v.b.and_(v.b.lshr(first, eight), low_bytes), v.b.and_(second, high_bytes))
        index = None
        for nibble in range(-(-self.product.state_bits // 4)):
            source = high if nibble > 1 else low
            if nibble & 1:
                source = v.b.lshr(source, v.all_ints(4))
            own = v.shuffled_by(
                self._part_of_index(nibble), v.b.and_(source, v.all_ints(0x0F0F0F0F))
            )
            index = own if index is None else v.b.xor(index, own)
        return v.b.bitcast(index, v.bytes)

    def _part_of_index(self, nibble: int) -> Sequence[int]:
        """What 4 bits of the state add to the index."""
        import torch

        states = torch.arange(16) << 4 * nibble
        return reference_v2.indices(self.product.masks, states).tolist()
