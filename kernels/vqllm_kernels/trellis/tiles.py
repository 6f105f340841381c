"""Tiles of trellis-v1 in registers: a lane holds the codes of a tile, or of a part of its rows.

The lanes of a warp stand for 8 x 4 tiles, lane (g, t) of the pattern of `fragments` for tile
(g, t). A row of the tile then is a row of an operand of `mma`, its columns are values of k that the
lane holds, and rows i and i + half of the part are rows g and g + 8. Every place where a window of
bits begins is known when the kernel is compiled; the window of the first weight reaches back into
the word before, around the ring.

    lanes            first dimension: (part, warp along k, g = 8, t = 4)
    words            a tuple of uint32 [lanes], of the part, the first bit of the ring the highest
    states of a pair of rows   uint32 [lanes, 2, steps of a row]
"""

import triton
import triton.language as tl


@triton.jit
def columns(v, SIZE: tl.constexpr):
    """The columns of v [lanes, SIZE] as a tuple; SIZE is a power of two."""
    if SIZE == 1:
        out = (v.reshape(v.shape[0]),)
    else:
        even, odd = tl.split(v.reshape(v.shape[0], SIZE // 2, 2))
        evens = columns(even, SIZE // 2)
        odds = columns(odd, SIZE // 2)
        out = ()
        for i in tl.static_range(SIZE // 2):
            out = out + (evens[i], odds[i])
    return out


@triton.jit
def load_chunks(ptrs, mask, NUM: tl.constexpr, CHUNK: tl.constexpr):
    """NUM words from ptrs [lanes] on, int32, as a tuple of [lanes, CHUNK]."""
    at = ptrs[:, None] + tl.arange(0, CHUNK)[None, :]
    out = ()
    for c in tl.static_range(NUM // CHUNK):
        v = tl.load(at + c * CHUNK, mask=mask[:, None], other=0, eviction_policy="evict_first")
        out = out + (v,)
    return out


@triton.jit
def in_order(word):
    """A word of two stored ones, uint32, the first of them in the high half."""
    word = word.to(tl.uint32, bitcast=True)
    return (word << 16) | (word >> 16)


@triton.jit
def words_of(chunks, NUM: tl.constexpr, CHUNK: tl.constexpr):
    """The chunks of `load_chunks` as NUM words."""
    out = ()
    for c in tl.static_range(NUM // CHUNK):
        out = out + columns(in_order(chunks[c]), CHUNK)
    return out


@triton.jit
def _state(words, before, END: tl.constexpr, L: tl.constexpr):
    """The L bits before bit END of the part."""
    AT: tl.constexpr = (END - 1) // 32
    SHIFT: tl.constexpr = (AT + 1) * 32 - END
    s = words[AT]
    if SHIFT > 0:
        s = s >> SHIFT
    if SHIFT + L > 32:
        if AT == 0:
            s = s | (before << (32 - SHIFT))
        else:
            s = s | (words[AT - 1] << (32 - SHIFT))
    if SHIFT + L != 32:
        s = s & ((1 << L) - 1)
    return s


@triton.jit
def stack(pieces, NUM: tl.constexpr):
    """NUM tensors, a power of two, side by side in new last dimensions of 2, in their order."""
    if NUM == 1:
        out = pieces[0]
    else:
        half = ()
        for j in tl.static_range(NUM // 2):
            half = half + (tl.join(pieces[j], pieces[j + NUM // 2]),)
        out = stack(half, NUM // 2)
    return out


@triton.jit
def pair_states(
    words,
    before,
    I: tl.constexpr,
    HALF: tl.constexpr,
    STEPS: tl.constexpr,
    TILE_BITS: tl.constexpr,
    TILE_STEPS: tl.constexpr,
    L: tl.constexpr,
):
    """States of rows I and I + HALF of the part: uint32 [lanes, 2, STEPS]."""
    pieces = ()
    for j in tl.static_range(STEPS):
        a = _state(words, before, (I * STEPS + j + 1) * TILE_BITS // TILE_STEPS, L)
        b = _state(words, before, ((I + HALF) * STEPS + j + 1) * TILE_BITS // TILE_STEPS, L)
        pieces = pieces + (tl.join(a, b),)
    return stack(pieces, STEPS).reshape(words[0].shape[0], 2, STEPS)


@triton.jit
def _looked_up(
    state,
    table_ptr,
    V: tl.constexpr,
    BY_SUM: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    ADDEND: tl.constexpr,
    FLIP: tl.constexpr,
):
    """The V values of states [lanes], from a table of states or of sums of bytes."""
    if BY_SUM:
        product = state * MULTIPLIER
        if ADDEND != 0:
            product = product + ADDEND
        if not FLIP:
            product = product ^ 0x80808080
        # Bytes are unsigned here, which takes fewer operations: the table begins with sum 0.
        even = product & 0x00FF00FF
        odd = (product >> 8) & 0x00FF00FF
        if V == 1:
            both = even + odd
            w = tl.load(table_ptr + ((both & 0xFFFF) + (both >> 16)).to(tl.int32))
        else:
            a = tl.load(table_ptr + ((even & 0xFFFF) + (even >> 16)).to(tl.int32))
            b = tl.load(table_ptr + 511 + ((odd & 0xFFFF) + (odd >> 16)).to(tl.int32))
            w = tl.join(a, b)
    else:
        at = table_ptr + state.to(tl.int32) * V
        w = tl.load(at)
        if V == 2:
            w = tl.join(w, tl.load(at + 1))
    return w


@triton.jit
def pair_values(
    words,
    before,
    table_ptr,
    I: tl.constexpr,
    HALF: tl.constexpr,
    STEPS: tl.constexpr,
    TILE_BITS: tl.constexpr,
    TILE_STEPS: tl.constexpr,
    L: tl.constexpr,
    V: tl.constexpr,
    BY_SUM: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    ADDEND: tl.constexpr,
    FLIP: tl.constexpr,
):
    """Values of rows I and I + HALF of the part, looked up: [lanes, 2, STEPS · V].

    One load for the states of all lanes at a time: of a tensor with more dimensions the compiler
    would choose the layout by its addresses, and pass every value through shared memory.
    """
    pieces = ()
    for j in tl.static_range(STEPS):
        a = _state(words, before, (I * STEPS + j + 1) * TILE_BITS // TILE_STEPS, L)
        b = _state(words, before, ((I + HALF) * STEPS + j + 1) * TILE_BITS // TILE_STEPS, L)
        a = _looked_up(a, table_ptr, V, BY_SUM, MULTIPLIER, ADDEND, FLIP)
        b = _looked_up(b, table_ptr, V, BY_SUM, MULTIPLIER, ADDEND, FLIP)
        pieces = pieces + (tl.join(a, b),)
    w = stack(pieces, STEPS)
    LANES: tl.constexpr = words[0].shape[0]
    if V == 1:
        w = w.reshape(LANES, 2, STEPS)
    else:
        w = w.reshape(LANES, 2, 2, STEPS).permute(0, 2, 3, 1).reshape(LANES, 2, STEPS * 2)
    return w


@triton.jit
def bytes_of(p):
    """The bytes of uint32 [...] as int8 [..., 2, 2], the lowest first."""
    low = tl.join(p.to(tl.int8), (p >> 16).to(tl.int8))
    high = tl.join((p >> 8).to(tl.int8), (p >> 24).to(tl.int8))
    return tl.join(low, high)
