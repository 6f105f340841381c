"""Device functions of the lut-v1 kernels: packed indices, and the entries that they name."""

# A constexpr is a number to the compiler, but not to a type checker.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl

from vqllm_kernels.fragments import pick as _pick


@triton.jit
def index_at(row_ptrs, j, valid, row_bytes, BITS: tl.constexpr):
    """Index j of a packed row, byte by byte: int32, shaped as j."""
    bit = j * BITS
    byte = bit >> 3
    code = tl.load(row_ptrs + byte, mask=valid, other=0).to(tl.int32)
    if BITS > 8 or 8 % BITS != 0:
        in_row = valid & (byte + 1 < row_bytes)
        code |= tl.load(row_ptrs + byte + 1, mask=in_row, other=0).to(tl.int32) << 8
    if BITS > 8 and BITS % 8 != 0:
        in_row = valid & (byte + 2 < row_bytes)
        code |= tl.load(row_ptrs + byte + 2, mask=in_row, other=0).to(tl.int32) << 16
    return (code >> (bit & 7)) & ((1 << BITS) - 1)


@triton.jit
def index_in(q0, q1, q2, i: tl.constexpr, BITS: tl.constexpr):
    """Index i of a lane's words, 4 in each of q0, q1, q2 [L, 4]: int32 [L]."""
    WORD: tl.constexpr = i * BITS // 32
    SHIFT: tl.constexpr = i * BITS % 32
    q = q0 if WORD < 4 else (q1 if WORD < 8 else q2)
    code = _pick(q, WORD % 4) >> SHIFT
    if SHIFT + BITS > 32:
        q = q0 if WORD + 1 < 4 else (q1 if WORD + 1 < 8 else q2)
        code |= _pick(q, (WORD + 1) % 4) << (32 - SHIFT)
    return (code & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def load_quads(ptrs, j, rows_valid, row_words, QUADS: tl.constexpr):
    """1 or 3 loads of 16 bytes a lane, uint32 [L, 4] each; row_words is a multiple of 4·QUADS."""
    q0 = tl.load(ptrs, mask=rows_valid & (j < row_words), other=0, eviction_policy="evict_first")
    q0 = q0.to(tl.uint32, bitcast=True)
    q1, q2 = q0, q0
    if QUADS == 3:
        mask = rows_valid & (j + 4 < row_words)
        q1 = tl.load(ptrs + 4, mask=mask, other=0, eviction_policy="evict_first")
        mask = rows_valid & (j + 8 < row_words)
        q2 = tl.load(ptrs + 8, mask=mask, other=0, eviction_policy="evict_first")
        q1, q2 = q1.to(tl.uint32, bitcast=True), q2.to(tl.uint32, bitcast=True)
    return q0, q1, q2


@triton.jit
def _piece(ptrs, i: tl.constexpr, NUM: tl.constexpr):
    """Element i of each entry, or zero from NUM on: [L]."""
    return tl.load(ptrs + i) if i < NUM else tl.zeros_like(tl.load(ptrs))


@triton.jit
def _pieces2(ptrs, i: tl.constexpr, STEP: tl.constexpr, NUM: tl.constexpr):
    return tl.join(_piece(ptrs, i, NUM), _piece(ptrs, i + STEP, NUM))


@triton.jit
def _pieces4(ptrs, i: tl.constexpr, STEP: tl.constexpr, NUM: tl.constexpr):
    even = _pieces2(ptrs, i, 2 * STEP, NUM)
    return tl.join(even, _pieces2(ptrs, i + STEP, 2 * STEP, NUM)).reshape(ptrs.shape[0], 4)


@triton.jit
def _pieces8(ptrs, i: tl.constexpr, STEP: tl.constexpr, NUM: tl.constexpr):
    even = _pieces4(ptrs, i, 2 * STEP, NUM)
    return tl.join(even, _pieces4(ptrs, i + STEP, 2 * STEP, NUM)).reshape(ptrs.shape[0], 8)


@triton.jit
def _pieces(ptrs, NUM: tl.constexpr):
    """The NUM <= 8 elements of each entry, one load each, padded to a power of two: [L, ..]."""
    if NUM == 1:
        pieces = tl.load(ptrs)[:, None]
    elif NUM == 2:
        pieces = _pieces2(ptrs, 0, 1, NUM)
    elif NUM <= 4:
        pieces = _pieces4(ptrs, 0, 1, NUM)
    else:
        pieces = _pieces8(ptrs, 0, 1, NUM)
    return pieces


@triton.jit
def entry(codebook_ptr, index, V: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr):
    """Entries of the table, float16 [L, SIZE], padded with zeros to powers of two in V and D."""
    e = tl.arange(0, SIZE)[None, :]
    E: tl.constexpr = V * D
    PAD_D: tl.constexpr = triton.next_power_of_2(D)
    if E == SIZE and SIZE <= 8:
        entry = tl.load(codebook_ptr + index[:, None] * SIZE + e)
    elif E == SIZE and SIZE == 16:
        ptrs = codebook_ptr + index[:, None] * SIZE + tl.arange(0, 8)[None, :]
        entry = tl.join(tl.load(ptrs), tl.load(ptrs + 8)).permute(0, 2, 1)
        entry = entry.reshape(index.shape[0], SIZE)
    elif D == PAD_D and E % 2 == 0 and E <= 16:
        # Entries are not aligned to their size. Loaded as [L, SIZE] they would be spread over
        # several lanes; as pieces of 4 bytes all of an entry stays in its lane.
        pairs = _pieces(codebook_ptr.to(tl.pointer_type(tl.uint32)) + index * (E // 2), E // 2)
        low = (pairs & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
        high = (pairs >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
        entry = tl.join(low, high).reshape(index.shape[0], SIZE)
    elif D == PAD_D and E <= 8:
        entry = _pieces(codebook_ptr + index * E, E)
    else:
        v, d = e // PAD_D, e % PAD_D
        offsets = index[:, None] * E + v * D + d
        entry = tl.load(codebook_ptr + offsets, mask=(v < V) & (d < D), other=0.0)
    return entry
