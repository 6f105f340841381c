"""Several matrices in one launch: those of the linears of one input (q, k, v; gate, up).

What a member has of its own, packed codes, rows, outputs, reaches a kernel as a tuple with one
entry a member; the codes stay where they are. Programs are dealt out to the members one after the
other, and each chooses its entries once, before its loop. Of a single member nothing is chosen.
"""

import triton
import triton.language as tl


@triton.jit
def choose(member, entries):
    """The entry of a member: a pointer or a number."""
    entry = entries[0]
    for m in tl.static_range(1, len(entries)):
        entry = tl.where(member == m, entries[m], entry)
    return entry


@triton.jit
def locate(program, rows, UNIT: tl.constexpr):
    """Which member a program belongs to, that have `rows` each and a program for UNIT of them.

    Returns:
        The member, the number of the program inside it, and the rows of the members before it.
    """
    member = 0
    first = 0
    before = 0
    end = 0
    rows_until = 0
    for m in tl.static_range(1, len(rows)):
        end += tl.cdiv(rows[m - 1], UNIT)
        rows_until += rows[m - 1]
        is_later = program >= end
        member = tl.where(is_later, m, member)
        first = tl.where(is_later, end, first)
        before = tl.where(is_later, rows_until, before)
    return member, program - first, before


@triton.jit
def total(numbers):
    """The sum of the entries."""
    out = numbers[0]
    for m in tl.static_range(1, len(numbers)):
        out += numbers[m]
    return out
