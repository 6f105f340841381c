"""Operations on registers, as LLVM's IR: what the kernels of all formats are built from.

Most of them are LLVM's own vector operations, which it translates for any processor. Only products
of bytes are instructions of one set.

Source: vpdpbusd, vpdpwssd, vpmaddubsw, vpmaddwd: Intel 64 and IA-32 Architectures Software
Developer's Manual, volume 2.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from llvmlite import ir

from vqllm_kernels.compiled import cgutils
from vqllm_kernels.cpu.instructions import Instructions

INT8, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
Value = Any
"""A value of LLVM's IR; llvmlite has no types for them."""


@cache
def _has_byte_operands() -> bool:
    """Whether vpdpbusd takes vectors of bytes: before LLVM 21 it took those of int32."""
    import llvmlite.binding

    return llvmlite.binding.llvm_version_info[0] >= 21


class Vectors:
    """Registers of `lanes` int32, or four times as many bytes, of one set of instructions."""

    def __init__(self, builder: Any, instructions: Instructions) -> None:
        """`instructions` is "avx512" or "avx2": the portable kernels use no vectors."""
        self.b = builder
        self.wide = instructions == "avx512"
        self.lanes = 16 if self.wide else 8
        self.bytes = ir.VectorType(INT8, 4 * self.lanes)
        self.words = ir.VectorType(INT16, 2 * self.lanes)
        self.ints = ir.VectorType(INT32, self.lanes)
        self.quarter = ir.VectorType(INT8, 16)
        self.floats = ir.VectorType(ir.FloatType(), self.lanes)

    def int64(self, value: int) -> Value:
        return ir.Constant(INT64, value)

    def all_ints(self, value: int) -> Value:
        """The same int32 in every lane."""
        return ir.Constant(self.ints, [value & 0xFFFFFFFF] * self.lanes)

    def at(self, address: Value, offset: Value | int, kind: Any) -> Value:
        """A pointer to `kind`, `offset` bytes behind an address."""
        offset = self.int64(offset) if isinstance(offset, int) else offset
        return self.b.inttoptr(self.b.add(address, offset), kind.as_pointer())

    def step(self, address: Value, apart: Value, number: int) -> Value:
        """The address of one of several things, `apart` bytes from each other."""
        return self.b.add(address, self.b.mul(apart, self.int64(number)))

    def load(self, address: Value, offset: Value | int, kind: Any, align: int = 1) -> Value:
        return self.b.load(self.at(address, offset, kind), align=align)

    def store(self, value: Value, address: Value, offset: Value | int) -> None:
        self.b.store(value, self.at(address, offset, value.type), align=1)

    def spread(self, address: Value, offset: Value | int) -> Value:
        """The int32 at an address in every lane."""
        one = self.load(address, offset, INT32, align=4)
        empty = ir.Constant(self.ints, ir.Undefined)
        first = self.b.insert_element(empty, one, ir.Constant(INT32, 0))
        return self.b.shuffle_vector(first, empty, self.all_ints(0))

    def prefetch(self, address: Value, offset: Value | int) -> None:
        """Ask for the line of the cache at an address; one outside of memory is no fault."""
        pointer = ir.IntType(8).as_pointer()
        function = cgutils.get_or_insert_function(
            self.b.module,
            ir.FunctionType(ir.VoidType(), [pointer, INT32, INT32, INT32]),
            "llvm.prefetch.p0",
        )
        place = self.at(address, offset, INT8)
        self.b.call(function, [place, *(ir.Constant(INT32, v) for v in (0, 3, 1))])

    def pick_bytes(self, address: Value, size: int, wanted: Sequence[int]) -> Value:
        """Bytes of a piece of memory by their places, a constant for each byte of the register.

        Args:
            address: of the piece.
            size: its bytes, at least 32. Nothing outside of it is read.
        """
        width = 64 if self.wide else 16
        parts = [
            self._pick(address, size, wanted[i : i + width]) for i in range(0, len(wanted), width)
        ]
        if len(parts) == 1:
            return parts[0]
        every = ir.Constant(ir.VectorType(INT32, 2 * width), list(range(2 * width)))
        return self.b.shuffle_vector(parts[0], parts[1], every)

    def _pick(self, address: Value, size: int, wanted: Sequence[int]) -> Value:
        """One register of as many bytes as are wanted, from as few loads as hold them."""
        width = len(wanted)
        if size < width:  # 64 bytes of a smaller piece, in two halves that overlap
            half = width // 2
            a, b = self._window(address, 0, half), self._window(address, size - half, half)
            return self._shuffled(a, b, [i if i < half else i - size + width for i in wanted])
        starts: list[int] = []
        while rest := [i for i in wanted if not any(s <= i < s + width for s in starts)]:
            # At a ring's end there is more than one: its last bytes come before its first.
            starts.append(min(*rest, size - width))
        loads = [self._window(address, start, width) for start in starts]
        found = [0 for _ in wanted]  # the load that has each byte
        for n in range(len(starts) - 1, -1, -1):
            found = [n if starts[n] <= i < starts[n] + width else f for i, f in zip(wanted, found)]
        value = loads[0]
        for n in range(max(1, len(loads) - 1)):
            # Bytes of the next load join those that are in their places already.
            other = loads[min(n + 1, len(loads) - 1)]
            places = []
            for k, (i, f) in enumerate(zip(wanted, found)):
                before = i - starts[0] if n == 0 else k
                places.append(i - starts[f] + width if f == n + 1 else before if f <= n else 0)
            value = self._shuffled(value, other, places)
        return value

    def _window(self, address: Value, start: int, width: int) -> Value:
        return self.load(address, start, ir.VectorType(INT8, width))

    def _shuffled(self, a: Value, b: Value, places: Sequence[int]) -> Value:
        return self.b.shuffle_vector(
            a, b, ir.Constant(ir.VectorType(INT32, len(places)), list(places))
        )

    def shuffled(self, value: Value, places: Sequence[int]) -> Value:
        """The bytes of a register in another order."""
        return self._shuffled(value, value, places)

    def joined(self, low: Value, high: Value, places: Sequence[int]) -> Value:
        """int16 of bytes of two registers, by their places in both."""
        wide = self._shuffled(low, high, places)
        return self.b.bitcast(wide, self.words)

    def half(self, words: Value, number: int) -> Value:
        """The lower or the upper half of a register of int16."""
        return self._shuffled(words, words, range(number * self.lanes, (number + 1) * self.lanes))

    def shuffle_in_words(self, value: Value, order: Sequence[int]) -> Value:
        """The four bytes of every int32 in another order."""
        places = [4 * lane + i for lane in range(self.lanes) for i in order]
        data = self.b.bitcast(value, self.bytes)
        return self.b.bitcast(self._shuffled(data, data, places), self.ints)

    def shift_right(self, value: Value, by: Sequence[int]) -> Value:
        """Every int32 shifted by its own constant."""
        if not any(by):
            return value
        return self.b.lshr(value, ir.Constant(self.ints, list(by)))

    def add_bytes_products(self, sums: Value, unsigned: Value, signed: Value) -> Value:
        """sums + the four products of bytes of every lane, all int32; "avx512" only."""
        kind = self.bytes if _has_byte_operands() else self.ints
        function = self._instruction("llvm.x86.avx512.vpdpbusd.512", self.ints, [kind, kind])
        a, b = (self.b.bitcast(v, kind) for v in (unsigned, signed))
        return self.b.call(function, [sums, a, b])

    def add_word_products(self, sums: Value, left: Value, right: Value) -> Value:
        """sums + the two products of int16 of every lane."""
        if self.wide:
            kind = self.words if _has_byte_operands() else self.ints
            function = self._instruction("llvm.x86.avx512.vpdpwssd.512", self.ints, [kind, kind])
            a, b = (self.b.bitcast(v, kind) for v in (left, right))
            return self.b.call(function, [sums, a, b])
        function = self._function("llvm.x86.avx2.pmadd.wd", self.ints, [self.words, self.words])
        a, b = (self.b.bitcast(v, self.words) for v in (left, right))
        return self.b.add(sums, self.b.call(function, [a, b]))

    def pair_sums(self, value: Value, is_signed: bool) -> Value:
        """Sums of neighbouring bytes, two int16 in every int32."""
        name = "llvm.x86.avx512.pmaddubs.w.512" if self.wide else "llvm.x86.avx2.pmadd.ub.sw"
        function = self._function(name, self.words, [self.bytes, self.bytes])
        ones = ir.Constant(self.bytes, [1] * 4 * self.lanes)
        data = self.b.bitcast(value, self.bytes)
        pair = [ones, data] if is_signed else [data, ones]
        return self.b.bitcast(self.b.call(function, pair), self.ints)

    def times_word(self, value: Value, factor: int) -> Value:
        """The lower halves of the products of every int16 with a constant."""
        return self._of_words(self.b.mul, value, self._all_words(factor))

    def times_word_above(self, value: Value, factor: int) -> Value:
        """The upper halves of the products of every uint16 with a constant; "avx512" only."""
        name = "llvm.x86.avx512.pmulhu.w.512"
        function = self._function(name, self.words, [self.words, self.words])
        product = self.b.call(
            function, [self.b.bitcast(value, self.words), self._all_words(factor)]
        )
        return self.b.bitcast(product, self.ints)

    def add_words(self, left: Value, right: Value) -> Value:
        return self._of_words(self.b.add, left, self.b.bitcast(right, self.words))

    def _of_words(self, operation: Callable[[Value, Value], Value], a: Value, b: Value) -> Value:
        return self.b.bitcast(operation(self.b.bitcast(a, self.words), b), self.ints)

    def _all_words(self, value: int) -> Value:
        return ir.Constant(self.words, [value] * 2 * self.lanes)

    def bits_from(self, value: Value, starts: Sequence[int]) -> Value:
        """Eight bits for every byte, from the 64 bits that it lies in, a constant place for each;
        "avx512" only."""
        function = self._function(
            "llvm.x86.avx512.pmultishift.qb.512", self.bytes, [self.bytes, self.bytes]
        )
        places = ir.Constant(self.bytes, [start % 64 for start in starts])
        return self.b.call(function, [places, value])

    def times_matrix(self, value: Value, matrix: int) -> Value:
        """Every byte, a vector over GF(2), times a matrix of 8 x 8, the row of bit i in byte 7 - i.

        "avx512" only.
        """
        function = self._function(
            "llvm.x86.vgf2p8affineqb.512", self.bytes, [self.bytes, self.bytes, INT8]
        )
        rows = [matrix >> 8 * i & 255 for i in range(8)] * (self.lanes // 2)
        return self.b.call(function, [value, ir.Constant(self.bytes, rows), ir.Constant(INT8, 0)])

    def shuffle_of_16(self, entries: Sequence[int], index: Value) -> Value:
        """One of 16 constant bytes for every byte, below 16; "avx512" only."""
        table = ir.Constant(self.bytes, [entry & 255 for entry in entries] * 4)
        function = self._function(
            "llvm.x86.avx512.pshuf.b.512", self.bytes, [self.bytes, self.bytes]
        )
        return self.b.call(function, [table, index])

    def spread_long(self, address: Value, offset: int) -> Value:
        """The 8 bytes at an address, in every 8 bytes; "avx512" only."""
        kind = ir.VectorType(INT64, self.lanes // 2)
        one = self.load(address, offset, INT64, align=4)
        empty = ir.Constant(kind, ir.Undefined)
        first = self.b.insert_element(empty, one, ir.Constant(INT32, 0))
        order = ir.Constant(ir.VectorType(INT32, self.lanes // 2), [0] * (self.lanes // 2))
        return self.b.bitcast(self.b.shuffle_vector(first, empty, order), self.ints)

    def shuffled_by(self, entries: Sequence[int], index: Value) -> Value:
        """One of 16 constant bytes for every byte, below 16, of int32; "avx2" only."""
        table = ir.Constant(self.bytes, list(entries) * 2)
        return self.b.bitcast(self._look_up_16(table, self.b.bitcast(index, self.bytes)), self.ints)

    def look_up(self, table: Sequence[Value], index: Value) -> Value:
        """Bytes of a table of 64 or 128 int8, in registers of 64 ("avx512") or of 16 ("avx2")."""
        if self.wide:
            if len(table) == 1:
                name, kinds = "llvm.x86.avx512.permvar.qi.512", [self.bytes, self.bytes]
                return self.b.call(self._function(name, self.bytes, kinds), [table[0], index])
            name, kinds = "llvm.x86.avx512.vpermi2var.qi.512", [self.bytes] * 3
            arguments = [table[0], index, table[1]]
            return self.b.call(self._function(name, self.bytes, kinds), arguments)
        twice = ir.Constant(ir.VectorType(INT32, 32), [i % 16 for i in range(32)])
        found = [
            self._look_up_16(self.b.shuffle_vector(part, part, twice), index) for part in table
        ]
        bit = 4
        while len(found) > 1:
            # The sign of a byte chooses: the bit of the index moves there.
            moved = self.b.shl(self.b.bitcast(index, self.ints), self.all_ints(7 - bit))
            signs = self.b.bitcast(moved, self.bytes)
            chosen = self.b.icmp_signed("<", signs, ir.Constant(self.bytes, [0] * 32))
            found = [self.b.select(chosen, found[i + 1], found[i]) for i in range(0, len(found), 2)]
            bit += 1
        return found[0]

    def _look_up_16(self, table: Value, index: Value) -> Value:
        name = "llvm.x86.avx2.pshuf.b"
        return self.b.call(self._function(name, self.bytes, [self.bytes] * 2), [table, index])

    def word_pairs(self, value: Value) -> list[Value]:
        """int8 in bytes 0 and 2 of every int32 as two int16, and those in bytes 1 and 3."""
        words = self.b.bitcast(value, self.words)
        eight = ir.Constant(self.words, [8] * 2 * self.lanes)
        even = self.b.ashr(self.b.shl(words, eight), eight)
        return [self.b.bitcast(v, self.ints) for v in (even, self.b.ashr(words, eight))]

    def word_halves(self, value: Value) -> tuple[Value, Value]:
        """The low and the high int16 of every int32, as int32."""
        half = self.all_ints(16)
        return self.b.ashr(self.b.shl(value, half), half), self.b.ashr(value, half)

    def times_plus(self, value: Value, factor: Value, addend: Value) -> Value:
        """Integers as float32, times a factor and plus an addend, rounded once."""
        fma = self._function(f"llvm.fma.v{self.lanes}f32", self.floats, [self.floats] * 3)
        return self.b.call(fma, [self.b.sitofp(value, self.floats), factor, addend])

    def as_bfloat16(self, value: Value) -> Value:
        """Finite float32 as bfloat16, to the nearest and to even: int16 of half a register."""
        bits = self.b.bitcast(value, self.ints)
        odd = self.b.and_(self.b.lshr(bits, self.all_ints(16)), self.all_ints(1))
        rounded = self.b.add(self.b.add(bits, self.all_ints(0x7FFF)), odd)
        narrow = ir.VectorType(INT16, self.lanes)
        return self.b.trunc(self.b.lshr(rounded, self.all_ints(16)), narrow)

    def spread_float(self, address: Value, offset: int) -> Value:
        """The float32 at an address in every lane."""
        return self.b.bitcast(self.spread(address, offset), self.floats)

    def loop(self, count: Value, body: Callable[[Value], None]) -> None:
        """body(i) for i from 0 to count."""
        with cgutils.for_range(self.b, count) as loop:
            body(loop.index)

    def zeros(self, number: int) -> list[Value]:
        """So many registers of zeros that can be written to."""
        zero = self.all_ints(0)
        return [cgutils.alloca_once_value(self.b, zero) for _ in range(number)]

    def _instruction(self, name: str, result: Any, operands: Sequence[Any]) -> Value:
        return self._function(name, result, [result, *operands])

    def _function(self, name: str, result: Any, operands: Sequence[Any]) -> Value:
        return cgutils.get_or_insert_function(
            self.b.module, ir.FunctionType(result, list(operands)), name
        )
