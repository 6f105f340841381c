"""The bits of format leech-v1: 24 consecutive weights of a row as a point of the Leech lattice.

The lattice, in integers (√8 times the usual coordinates): X in Z^24 is a point if for m = 0 or 1

    all X_i ≡ m mod 2,    {i : (X_i − m)/2 odd} is a word of the Golay code,    ΣX_i ≡ 4m mod 8.

Shell s is the set of its points with |X|² = 16 s: 1, 0, 196560, 16773120, 398034000, ... points.
A format names L shells, W = gains[l] · X for a point X of shell l, and numbers the points.

The Golay code. H(k), k = 0..15, are the words of the Hamming code of 8 bits that is spanned by
0x8B, 0x96, 0xAC, 0xD8 (by bit 0..3 of k), H'(k) those of the one spanned by 0x8D, 0x9A, 0xB4, 0xE8.
Word number n = a + 16 b + 256 c (a, b, c in 0..15) has three bytes, coordinates 0..7 first (bit i
for coordinate i):

    H(a) ^ H'(c),    H(b) ^ H'(c),    H(a) ^ H(b) ^ H'(c).

The number of a point. The points of a shell fall into six classes: the odd ones (m = 1), and those
of even X whose word has 0, 8, 12, 16, 24 ones. Numbers are given to shell 0, 1, ... L − 1 in turn,
inside each to the classes in this order. Each class begins at a multiple of 4096; numbers that are
left over stand for the origin (the first after the last class is the one that is written). With r
the number inside the class, counted from 0:

    odd     word n = r mod 4096,            sequence q = r div 4096
    even    signs g = r mod 2^max(w−1, 0),  r' = r div 2^max(w−1, 0);  the word is the one with
            rank r' mod A_w among the A_w words of weight w in the order of their numbers,
            sequence q = r' div A_w

Sequences of 24 numbers k ≥ 0 with a fixed sum of costs, ranked lexicographically from q = 0:

    odd     place i is coordinate i; cost k(k+1)/2, sum 2s − 3;
            X_i = (−1)^k (2k + 1), times −1 where the word has a one
    even    the places are the w coordinates in the word, then the others, both ascending;
            sum s − w/4; in the word cost k(k+1), X_i = ±2 (2k + 1), minus at the j-th of these
            coordinates (j = 0..w−2) where bit j of g is one, at the last so that 8 divides ΣX_i;
            outside cost ceil(k/2)², X_i = 0, 4, −4, 8, −8, ... for k = 0, 1, 2, 3, 4, ...

The codes. Tile j of a row has bits [j·B, (j+1)·B) of it, least significant first, as 12-bit symbols
in `bitpack`.

Source: Conway and Sloane, Sphere Packings, Lattices and Groups, chapters 4 and 11 (the lattice, the
code as a sum of three Hamming words: Turyn); arXiv 2603.11021 (the lattice for weights of language
models, with another numbering).
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vqllm_kernels.bitpack import unpack_bits

DIMENSIONS = 24
SYMBOL_BITS = 12
MAX_SHELL = 53
"""The largest ball of shells with fewer than 2^72 points. Ranks of sequences are below 2^60."""

_ODD = 0
_WEIGHTS = (0, 8, 12, 16, 24)
"""Class 0 are the odd points; class i + 1 are the even ones whose word has _WEIGHTS[i] ones."""
_NUM_WORDS = (1, 759, 2576, 759, 1)
_MANY = 1 << 61
"""More sequences than any class has: 2^57 in shell 53."""
_CHUNK, _GPU_CHUNK = 1 << 13, 1 << 17
"""Tiles at a time, so that intermediate results take little memory: 1 KB a tile."""


@cache
def hamming_words() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """H and H': 16 bytes each."""

    def span(generators: tuple[int, ...]) -> tuple[int, ...]:
        words = [0]
        for generator in generators:
            words += [word ^ generator for word in words]
        return tuple(words)

    return span((0x8B, 0x96, 0xAC, 0xD8)), span((0x8D, 0x9A, 0xB4, 0xE8))


@cache
def golay_words() -> tuple[int, ...]:
    """The 4096 words in the order of their numbers, bit i for coordinate i."""
    h, h2 = hamming_words()
    return tuple(
        (h[a] ^ h2[c]) | (h[b] ^ h2[c]) << 8 | (h[a] ^ h[b] ^ h2[c]) << 16
        for c in range(16)
        for b in range(16)
        for a in range(16)
    )


def _costs(kind: int, place: int) -> list[int]:
    """Costs of the symbols k = 0, 1, ... at one place, as far as any shell can pay for them."""
    if kind == _ODD:
        return [k * (k + 1) // 2 for k in range(14)]
    if place < _WEIGHTS[kind - 1]:
        return [k * (k + 1) for k in range(7)]
    return [((k + 1) // 2) ** 2 for k in range(15)]


def _budget(kind: int, shell: int) -> int:
    """The sum of the costs of a point; negative for no points."""
    if kind == _ODD:
        return 2 * shell - 3
    weight = _WEIGHTS[kind - 1]
    if weight == 0 and shell % 2:
        return -1  # ΣX_i would be 4 mod 8
    return shell - weight // 4


@cache
def _ways(kind: int) -> list[list[int]]:
    """ways[place][budget]: sequences of the places from `place` on with this sum of costs."""
    size = _num_budgets(MAX_SHELL)
    ways = [[1] + [0] * (size - 1)]
    for place in reversed(range(DIMENSIONS)):
        after = ways[0]
        costs = _costs(kind, place)
        ways.insert(0, [sum(after[n - c] for c in costs if c <= n) for n in range(size)])
    return ways


def num_sequences(kind: int, shell: int) -> int:
    """Sequences of a class of a shell."""
    budget = _budget(kind, shell)
    return _ways(kind)[0][budget] if budget >= 0 else 0


def class_size(kind: int, shell: int) -> int:
    """Points of a class of a shell."""
    if kind == _ODD:
        return 4096 * num_sequences(kind, shell)
    num_signs = 1 << max(_WEIGHTS[kind - 1] - 1, 0)
    return num_signs * _NUM_WORDS[kind - 1] * num_sequences(kind, shell)


def shell_size(shell: int) -> int:
    """Points of a shell."""
    return sum(class_size(kind, shell) for kind in range(6))


def origin(shells: tuple[int, ...]) -> int:
    """The number of the origin: the first after those of the shells."""
    sizes = [class_size(kind, shell) for shell in shells for kind in range(6)]
    return sum(-(-size >> SYMBOL_BITS) for size in sizes) << SYMBOL_BITS


@dataclass(frozen=True)
class _Sections:
    """The classes of the shells of a format, in the order of their numbers."""

    ends: Tensor
    """The first number after each class, in units of 4096, int64 [S]."""
    starts: Tensor
    levels: Tensor
    """The place of the shell in the list of shells, int64 [S]."""
    kinds: Tensor
    keys: Tensor
    """The row of `_Tables.first` for the first place of the sequences."""
    num_sequences: Tensor
    of_class: Tensor
    """The section of a class of a shell, int64 [L, 6]."""


@cache
def _sections(shells: tuple[int, ...], device: torch.device) -> _Sections:
    rows, of_class, end = [], torch.zeros(len(shells), 6, dtype=torch.int64), 0
    for level, shell in enumerate(shells):
        for kind in range(6):
            size = class_size(kind, shell)
            if size:
                start, end = end, end - (-size >> SYMBOL_BITS)
                of_class[level, kind] = len(rows)
                key = _key(kind, 0, _budget(kind, shell), max(shells))
                rows.append((end, start, level, kind, key, num_sequences(kind, shell)))
    columns = (*map(torch.tensor, zip(*rows)), of_class)
    return _Sections(*(column.to(device) for column in columns))


@dataclass(frozen=True)
class _Tables:
    """Constants on one device."""

    words: Tensor
    """The Golay words by number, int64 [4096]."""
    ranked: Tensor
    """The number of the word of a class by its rank, int64 [6, 4096]."""
    ranks: Tensor
    """The rank of a word in its class, int64 [4096]."""
    sorted_words: Tensor
    sorted_numbers: Tensor
    first: Tensor
    """first[key, k]: sequences from this place on whose symbol here is less than k, int64; the last
    entry is larger than any rank. A key stands for class, place and what is left of the sum."""
    next: Tensor
    """next[key · (symbols + 1) + k]: the key of the next place after symbol k, int64."""
    bits: Tensor
    """The words once more, 16 for a one, int64 [4096, 24]."""
    places: Tensor
    """The places of the coordinates of an even point by the number of its word, int64 [4097, 24];
    the last row is for odd points."""
    last: Tensor
    """The last coordinate in a word, int64 [4096]."""
    values: Tensor
    """X_i of symbol k, plus 16 for a one of the word, 32 for an odd point, 64 for a minus sign of
    an even one, float32 [128]."""
    weights: Tensor
    """Ones of a word, int64 [4096]."""
    classes: Tensor
    """The class of an even point by the number of its word, int64 [4096]."""
    low_bits: Tensor
    """Bits of a number that are the word of an odd point or the signs of an even one, int64 [6]."""
    num_words: Tensor
    """Words that share the rest of the number with the sequences, int64 [6]."""


@cache
def _tables(max_shell: int, device: torch.device) -> _Tables:
    words = torch.tensor(golay_words())
    weight = (words[:, None] >> torch.arange(DIMENSIONS) & 1).sum(1)
    ranked = torch.zeros(6, 4096, dtype=torch.int64)
    ranks = torch.zeros(4096, dtype=torch.int64)
    for kind, w in enumerate(_WEIGHTS, start=1):
        members = (weight == w).nonzero()[:, 0]
        ranked[kind, : len(members)] = members
        ranks[members] = torch.arange(len(members))
    coordinate_E = torch.arange(DIMENSIONS)
    bits = words[:, None] >> coordinate_E & 1
    before = bits.cumsum(1) - bits
    places = torch.where(bits == 1, before, weight[:, None] + coordinate_E - before)
    tensors = (
        words,
        ranked,
        ranks,
        *words.sort(),
        *_sequence_tables(max_shell),
        16 * bits,
        torch.cat((places, coordinate_E[None])),
        (bits * (coordinate_E + 1)).amax(1).sub(1).clamp(min=0),
        _values(),
        weight,
        (weight[:, None] >= torch.tensor(_WEIGHTS)).sum(1),
        torch.tensor([SYMBOL_BITS, *(max(w - 1, 0) for w in _WEIGHTS)]),
        torch.tensor([1, *_NUM_WORDS]),
    )
    return _Tables(*(tensor.to(device) for tensor in tensors))


def _values() -> Tensor:
    k = torch.arange(16)
    inside = 2 * (2 * k + 1)
    outside = 4 * ((k + 1) // 2) * (2 * (k % 2) - 1)
    odd = (2 * k + 1) * (1 - 2 * (k % 2))
    plus = torch.cat((outside, inside, odd, -odd))
    minus = torch.cat((outside, -inside, odd, -odd))
    return torch.cat((plus, minus)).float()


def _num_budgets(max_shell: int) -> int:
    """Sums of costs are below this."""
    return max(2 * max_shell - 2, max_shell + 1)


def _key(kind: int, place: int, budget: int, max_shell: int) -> int:
    return (kind * DIMENSIONS + place) * _num_budgets(max_shell) + budget


def _sequence_tables(max_shell: int) -> tuple[Tensor, Tensor]:
    """`first` and `next` of `_Tables`."""
    num_budgets = _num_budgets(max_shell)
    num_symbols = max(
        sum(cost < num_budgets for cost in _costs(_ODD, 0)),
        sum(cost <= max_shell for cost in _costs(1, 0)),
    )
    num_keys = _key(6, 0, 0, max_shell)
    first = torch.zeros(num_keys, num_symbols + 1, dtype=torch.int64)
    next_ = torch.zeros(num_keys, num_symbols + 1, dtype=torch.int64)
    budget_B = torch.arange(num_budgets)
    for row in range(6 * DIMENSIONS):
        kind, place = divmod(row, DIMENSIONS)
        own = slice(row * num_budgets, (row + 1) * num_budgets)
        after = _ways(kind)[place + 1]
        for k, cost in enumerate(_costs(kind, place)[:num_symbols]):
            ways = [after[n - cost] if cost <= n else 0 for n in range(num_budgets)]
            # A sum that no point has may have more sequences than int64 can count.
            counted_B = torch.tensor([min(way, _MANY) for way in ways])
            first[own, k + 1 :] = (first[own, k] + counted_B).clamp(max=_MANY)[:, None]
            next_[own, k] = (row + 1) * num_budgets + (budget_B - cost).clamp(min=0)
    first[:, -1] = _MANY
    return first, next_.flatten()


def points(symbols: Tensor, shells: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The points of numbers.

    Args:
        symbols: 12 bits each, the lowest of a number first, integers [N, index_bits / 12].

    Returns:
        X, float32 [N, 24], and the place of its shell in `shells`, int64 [N]: 0 for the origin.
    """
    size = _CHUNK if symbols.device.type == "cpu" else _GPU_CHUNK
    chunks = [_points(chunk, shells) for chunk in symbols.split(size)]
    return torch.cat([X for X, _ in chunks]), torch.cat([level for _, level in chunks])


def _points(symbols_NM: Tensor, shells: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    device = symbols_NM.device
    sections, t = _sections(shells, device), _tables(max(shells), device)
    low_N, *high = symbols_NM.to(torch.int64).unbind(1)
    high_N = sum((part << SYMBOL_BITS * i for i, part in enumerate(high)), torch.zeros_like(low_N))
    section_N = torch.searchsorted(sections.ends, high_N, right=True)
    section_N = section_N.clamp(max=len(sections.ends) - 1)
    high_N = high_N - sections.starts[section_N]
    kind_N = sections.kinds[section_N]

    # The `low_bits` of (high, low), and the rest of the number.
    from_low_N = t.low_bits[kind_N].clamp(max=SYMBOL_BITS)
    from_high_N = t.low_bits[kind_N] - from_low_N
    signs_N = (low_N & (1 << from_low_N) - 1) | (high_N & (1 << from_high_N) - 1) << SYMBOL_BITS
    rest_N = high_N >> from_high_N << SYMBOL_BITS - from_low_N | low_N >> from_low_N
    rank_N = rest_N // t.num_words[kind_N]
    odd_N = kind_N == _ODD
    word_N = torch.where(odd_N, signs_N, t.ranked[kind_N, rest_N % t.num_words[kind_N]])
    is_point_N = (high_N < (sections.ends - sections.starts)[section_N]) & (
        rank_N < sections.num_sequences[section_N]
    )
    rank_N = torch.where(is_point_N, rank_N, 0)

    key_N, first, symbols = sections.keys[section_N], t.first.flatten(), []
    for _ in range(DIMENSIONS):
        first_NK = t.first.index_select(0, key_N)
        k_N = (first_NK[:, 1:] <= rank_N[:, None]).sum(1)
        entry_N = key_N * t.first.shape[1] + k_N
        rank_N = rank_N - first.index_select(0, entry_N)
        key_N = t.next.index_select(0, entry_N)
        symbols.append(k_N)

    places_NE = t.places.index_select(0, torch.where(odd_N, len(t.words), word_N))
    value_NE = torch.stack(symbols, 1).gather(1, places_NE)
    value_NE += t.bits.index_select(0, word_N)
    # There are no signs from the last place in the word on: their bits are 0.
    value_NE += (signs_N[:, None] >> places_NE & 1) << 6
    value_NE += odd_N[:, None] * 32
    X_NE = t.values.index_select(0, value_NE.flatten()).view_as(value_NE)
    wrong_N = ~odd_N & (X_NE.sum(1) % 8 != 0)
    last_N1 = t.last.index_select(0, word_N)[:, None]
    X_NE.scatter_(1, last_N1, X_NE.gather(1, last_N1) * (1 - 2 * wrong_N[:, None].float()))
    return X_NE * is_point_N[:, None], sections.levels[section_N] * is_point_N


def numbers(X_NE: Tensor, level_N: Tensor, shells: tuple[int, ...], index_bits: int) -> Tensor:
    """Inverse of `points`: symbols, int32 [N, index_bits / 12].

    Args:
        X_NE: points of the lattice, in any dtype; at the origin the level may be any.
        level_N: the places of their shells in `shells`.

    Raises:
        ValueError: a vector that is no point of its shell.
    """
    chunks = zip(X_NE.split(_CHUNK), level_N.split(_CHUNK))
    return torch.cat([_numbers(X, level, shells, index_bits) for X, level in chunks])


def _numbers(X_NE: Tensor, level_N: Tensor, shells: tuple[int, ...], index_bits: int) -> Tensor:
    device, X_NE, level_N = X_NE.device, X_NE.to(torch.int64), level_N.to(torch.int64)
    sections, t = _sections(shells, device), _tables(max(shells), device)
    is_origin_N = (X_NE == 0).all(1)
    coordinate_E = torch.arange(DIMENSIONS, device=device)
    m_N = X_NE[:, 0] & 1
    odd_N = m_N == 1
    bits_NE = X_NE - m_N[:, None] >> 1 & 1
    word_N = (bits_NE << coordinate_E).sum(1)
    place_N = torch.searchsorted(t.sorted_words, word_N).clamp(max=len(t.words) - 1)
    shell_N = torch.tensor(shells, device=device)[level_N]
    is_point_N = (
        (t.sorted_words[place_N] == word_N)
        & (m_N[:, None] == X_NE & 1).all(1)
        & (X_NE.sum(1) & 7 == 4 * m_N)
        & ((X_NE * X_NE).sum(1) == 16 * shell_N)
    )
    if not bool((is_point_N | is_origin_N).all()):
        bad = int((~(is_point_N | is_origin_N)).sum())
        raise ValueError(f"{bad} of {len(X_NE)} vectors are no points of the shells they are in")
    number_N = t.sorted_numbers[place_N]

    weight_N = t.weights[number_N]
    kind_N = torch.where(odd_N, _ODD, t.classes[number_N])
    places_NE = t.places[torch.where(odd_N, len(t.words), number_N)]
    size_NE = X_NE.abs()
    k_inside_NE = torch.where(odd_N[:, None], size_NE >> 1, size_NE >> 2)
    k_outside_NE = (size_NE >> 1) - (X_NE > 0).to(torch.int64)
    inside_NE = odd_N[:, None] | (bits_NE == 1)
    k_NE = torch.where(inside_NE, k_inside_NE, k_outside_NE)
    k_NP = torch.zeros_like(k_NE).scatter(1, places_NE, k_NE)

    section_N = sections.of_class[level_N, kind_N]
    key_N, first, rank_N = sections.keys[section_N], t.first.flatten(), torch.zeros_like(kind_N)
    for k_N in k_NP.unbind(1):
        entry_N = key_N * t.first.shape[1] + k_N
        rank_N = rank_N + first.index_select(0, entry_N)
        key_N = t.next.index_select(0, entry_N)

    signed_NE = (X_NE < 0) & (places_NE < weight_N[:, None] - 1)
    signs_N = torch.where(odd_N, number_N, (signed_NE.to(torch.int64) << places_NE).sum(1))
    rest_N = rank_N * t.num_words[kind_N] + torch.where(odd_N, 0, t.ranks[number_N])
    to_low_N = t.low_bits[kind_N].clamp(max=SYMBOL_BITS)
    to_high_N = t.low_bits[kind_N] - to_low_N
    low_N = (rest_N << to_low_N | signs_N) & (1 << SYMBOL_BITS) - 1
    high_N = rest_N >> SYMBOL_BITS - to_low_N << to_high_N | signs_N >> SYMBOL_BITS
    low_N = torch.where(is_origin_N, 0, low_N)
    high_N = torch.where(is_origin_N, sections.ends[-1], sections.starts[section_N] + high_N)
    shifts = range(0, index_bits - SYMBOL_BITS, SYMBOL_BITS)
    symbols = [low_N, *(high_N >> shift & (1 << SYMBOL_BITS) - 1 for shift in shifts)]
    return torch.stack(symbols, 1).to(torch.int32)


def codewords(symbols: Tensor, gains: Tensor, shells: tuple[int, ...]) -> Tensor:
    """Weights of codes, float32 [..., 24].

    Args:
        symbols: integers [..., index_bits / 12].
        gains: float [L].
    """
    X_NE, level_N = points(symbols.flatten(0, -2), shells)
    return (gains[level_N, None] * X_NE).unflatten(0, symbols.shape[:-1])


def decode(
    tensors: dict[str, Tensor], index_bits: int, shells: tuple[int, ...], rows: int, cols: int
) -> Tensor:
    """Weights, float32 [rows, cols].

    Args:
        tensors: `codes` uint8 [rows, packed_bytes(ceil(cols/24), index_bits)], `gains` float32 [L].
    """
    num_tile_cols, num_symbols = -(-cols // DIMENSIONS), index_bits // SYMBOL_BITS
    symbols = unpack_bits(tensors["codes"], SYMBOL_BITS, num_tile_cols * num_symbols)
    W_IJE = codewords(symbols.unflatten(-1, (-1, num_symbols)), tensors["gains"], shells)
    return W_IJE.flatten(1)[:rows, :cols]
