"""Codes that lie row by row: what the kernels that read 8 rows at a time have in common."""

from llvmlite import ir

from vqllm_kernels.cpu.tiles import AHEAD
from vqllm_kernels.cpu.vectors import INT32, INT64, Value, Vectors

ROWS = 8
"""Rows of W that are read together: a register has the same number of bytes of each."""


def addresses(v: Vectors, codes: Value, stride: Value, last_row: Value) -> list[Value]:
    """Where the rows begin.

    Args:
        codes: address of the first one.
        stride: bytes from one row to the next.
        last_row: of the 8, the last one that is there; those behind it repeat it.
    """
    found = []
    for r in range(ROWS):
        row = ir.Constant(INT64, r)
        row = v.b.select(v.b.icmp_signed("<", row, last_row), row, last_row)
        found.append(v.b.add(codes, v.b.mul(row, stride)))
    return found


def ahead(v: Vectors, codes: Value, stride: Value) -> Value:
    """The address from which on codes are asked for while these rows are read: rows lie one behind
    the other, so that it is where the next 8 begin, or further where those are short."""
    block = v.b.mul(stride, v.int64(ROWS))
    far = v.b.select(v.b.icmp_signed(">", block, v.int64(AHEAD)), block, v.int64(AHEAD))
    return v.b.add(codes, far)


def store_sums(v: Vectors, chains: list[Value], out: Value, number: int) -> None:
    """Add up the chains of a sum, and the two int32 that each row has in it, and write the 8 int32
    to place `number` of `out`."""
    total = v.b.load(chains[0])
    for other in chains[1:]:
        total = v.b.add(total, v.b.load(other))
    even, odd = (
        v.b.shuffle_vector(
            total, total, ir.Constant(ir.VectorType(INT32, ROWS), list(range(k, 2 * ROWS, 2)))
        )
        for k in range(2)
    )
    v.store(v.b.add(even, odd), out, 4 * ROWS * number)


def look_up_256(v: Vectors, table: list[Value], index: Value) -> Value:
    """Bytes of a table of 256 in four registers."""
    upper = v.b.icmp_signed("<", index, ir.Constant(v.bytes, [0] * 64))
    return v.b.select(upper, v.look_up(table[2:], index), v.look_up(table[:2], index))
