"""Codes whose weights are sums of the bytes of a product: bytes2, bytes4, mul1, mul2, 1mad."""

from collections.abc import Sequence

from vqllm_kernels.cpu.tiles import Place, TileEmitter
from vqllm_kernels.cpu.vectors import Value
from vqllm_kernels.trellis import reference


class ByteSums(TileEmitter):
    """One multiplication makes the bytes of a register of states."""

    @property
    def is_signed(self) -> bool:
        return self.product.code not in reference.UNSIGNED

    def operands(self, tile: Value, places: Sequence[Place]) -> list[list[Value]]:
        return [self._operands(tile, place.group, place.piece) for place in places]

    def columns(self, tile: Value, places: Sequence[Place]) -> list[list[Value]]:
        return [self._columns(tile, place.group, place.piece) for place in places]

    def _operands(self, tile: Value, group: int, piece: int) -> list[Value]:
        if self.product.in_words:
            return self._of_pairs(tile, group, piece)
        values = [self._bytes(state) for state in self.states(tile, group, piece)]
        if not self.product.is_bytes:
            return [self._words(value) for value in values]
        return [self._unsigned(value) for value in values]

    def _of_pairs(self, tile: Value, group: int, piece: int) -> list[Value]:
        """From two states in an int32: one multiplication of words makes the lower halves of both
        products, two make the upper ones, where one of int32 counts as two."""
        v = self.v
        factor = reference.MULTIPLIERS[self.product.code]
        found = []
        for states in self.state_pairs(tile, group, piece):
            low = v.times_word(states, factor & 0xFFFF)
            high = v.add_words(
                v.times_word_above(states, factor & 0xFFFF), v.times_word(states, factor >> 16)
            )
            if self.product.is_bytes:
                found += [self._unsigned(low), self._unsigned(high)]
            else:
                sums = [v.pair_sums(half, self.is_signed) for half in (low, high)]
                found.append(v.add_words(*sums))
        return found

    def _unsigned(self, value: Value) -> Value:
        return self.v.b.xor(value, self.v.all_ints(0x80808080)) if self.is_signed else value

    def _columns(self, tile: Value, group: int, piece: int) -> list[Value]:
        found = []
        for state in self.states(tile, group, piece):
            low, high = self.v.word_halves(self._words(self._bytes(state)))
            found += [low, high] if self.product.step_weights == 2 else [self.v.b.add(low, high)]
        return found

    def _bytes(self, state: Value) -> Value:
        v, code = self.v, self.product.code
        value = v.b.mul(state, v.all_ints(reference.MULTIPLIERS[code]))
        addend = reference.ADDENDS.get(code)
        return value if addend is None else v.b.add(value, v.all_ints(addend))

    def _words(self, value: Value) -> Value:
        """Sums of bytes in two int16: the two weights of a state, or the two halves of one."""
        if self.product.step_weights == 2:
            value = self.v.shuffle_in_words(value, (0, 2, 1, 3))
        return self.v.pair_sums(value, self.is_signed)
