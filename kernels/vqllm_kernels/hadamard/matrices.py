"""Orthonormal transforms for every order, built from Hadamard matrices.

An order is split into Kronecker factors, Q = Q₁ ⊗ Q₂ ⊗ …, each small enough for a dense product:

    DCT-II     the odd part that no Hadamard matrix below takes up (usually absent)
    cores      Hadamard matrices of order odd·2^b: Paley I and II, Williamson, Turyn
    Sylvester  the powers of two that are left, always last

`factors` says which, and its size alone says what a factor is: odd sizes are DCTs, powers of two
are Sylvester's, the rest are cores. All entries of a Hadamard transform are ±1/√n; with a DCT
factor the largest is √(2/n), so vectors are still spread over the whole order, which is why the
full transform with a DCT factor is preferred to a block-diagonal one of Hadamard blocks.

The matrices are part of the stored format: a checkpoint holds only the signs that go with them. A
new construction would change the transform of the sizes that it serves, and so needs a new kind of
transform beside this one.
Sources: Paley, J. Math. Phys. 12 (1933); Williamson, Duke Math. J. 11 (1944); Goethals and Seidel,
Canad. J. Math. 19 (1967); Kharaghani and Tayfeh-Rezaie, J. Combin. Designs 13 (2005), order 428.
"""

import math
from collections.abc import Iterator
from functools import cache, lru_cache

import torch
from torch import Tensor

from vqllm_kernels.hadamard.galois import prime_power, quadratic_character

MAX_CORE = 512
"""Largest core. A dense product with a core of order k costs k multiplications a feature; past
512 a DCT on a small odd divisor with smaller cores is cheaper (10920 = 13 ⊗ 420 ⊗ 2 in place of
Paley's 5460) and mixes almost as well."""

WIDE_CORE = 256
"""Two cores are preferred to one above this order: the products cost less and a tile of the
matrix fits into the shared memory of a GPU."""

WILLIAMSON = {
    23: (0x02B, 0x153, 0x19C, 0x71B),
    29: (0x01CB, 0x06E5, 0x1C24, 0x24F5),
    43: (0x122867, 0x1E6D0E, 0x1A1594, 0x09AF02),
}
"""m -> four symmetric ±1 sequences of length m whose periodic autocorrelations add up to zero, for
Hadamard matrices of order 4m that Paley's constructions miss. Bit i − 1 is set where element i
(and m − i) is −1, 1 <= i <= (m − 1)/2; element 0 is 1. Found by matching all pairs of sequences
that are constant on the orbits of {1, −1} (m = 23, 29) or {±1, ±6, ±7} (m = 43)."""

TURYN = {107: "060989975b685d8fc80750b21c0212eceb26"}
"""m = 3n − 1 -> Turyn-type sequences X, Y, Z (length n) and W (length n − 1): one hexadecimal digit
a place with bits x y z w, the last one with bits x y z; a set bit means −1."""


@cache
def factors(order: int) -> tuple[int, ...]:
    """Sizes of the Kronecker factors of the transform of `order` features, first to last.

    Of all splits, the one with the smallest DCT; then without wide cores; then with the fewest
    cores; then with the smallest ones.
    """
    if order < 1:
        raise ValueError(f"a transform needs at least 1 feature, not {order}")
    twos = (order & -order).bit_length() - 1
    odd = order >> twos
    for dct in _divisors(odd):
        splits = [cores for cores in _core_splits(odd // dct, odd) if _twos(cores) <= twos]
        if splits:
            cores = min(splits, key=lambda c: (max(c, default=0) > WIDE_CORE, len(c), sum(c)))
            rest = order // (dct * math.prod(cores))
            return tuple(size for size in (dct, *cores, rest) if size > 1) or (1,)
    raise AssertionError("a DCT of the whole odd part always fits")


def is_hadamard(order: int) -> bool:
    """Whether the transform of this order has only entries ±1/√order."""
    return all(size % 2 == 0 or size == 1 for size in factors(order))


@lru_cache(maxsize=256)
def factor(size: int) -> Tensor:
    """One orthonormal factor, float64 [size, size]. `size` is one that `factors` names."""
    if size % 2 and size > 1:
        return _dct(size)
    return signs(size).double() / math.sqrt(size)


@lru_cache(maxsize=256)
def signs(size: int) -> Tensor:
    """The ±1 entries of a Hadamard factor, int8 [size, size]."""
    if size & (size - 1) == 0:
        return _sylvester(size)
    if (power := prime_power(size - 1)) and size % 4 == 0:
        return _paley1(power[0] ** power[1])
    if prime_power(size // 2 - 1) and size % 8 == 4:
        return _paley2(size // 2 - 1)
    if size % 4 == 0 and size // 4 in WILLIAMSON:
        return _goethals_seidel(_williamson(size // 4))
    if size % 4 == 0 and size // 4 in TURYN:
        return _goethals_seidel(_turyn(size // 4))
    raise ValueError(f"there is no Hadamard factor of order {size}")


def matrix(order: int) -> Tensor:
    """The whole transform Q, float64 [order, order]: Q Qᵀ = I."""
    return kronecker(factors(order))


def kronecker(sizes: tuple[int, ...]) -> Tensor:
    """The Kronecker product of the factors of these sizes, float64."""
    Q = torch.ones(1, 1, dtype=torch.float64)
    for size in sizes:
        Q = torch.kron(Q, factor(size))
    return Q


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


@cache
def _core(odd: int) -> int | None:
    """The smallest order odd·2^b, b >= 2, up to MAX_CORE, that `signs` can build."""
    order = 4 * odd
    while order <= MAX_CORE:
        paley = prime_power(order - 1) or (order % 8 == 4 and prime_power(order // 2 - 1))
        if paley or order // 4 in WILLIAMSON or order // 4 in TURYN:
            return order
        order *= 2
    return None


def _core_splits(odd: int, largest: int) -> Iterator[tuple[int, ...]]:
    """Cores whose odd parts multiply to `odd`, each at most `largest`, in descending order."""
    if odd == 1:
        yield ()
    for part in _divisors(odd):
        core = _core(part) if 1 < part <= largest else None
        if core is not None:
            for rest in _core_splits(odd // part, part):
                yield (core, *rest)


def _twos(cores: tuple[int, ...]) -> int:
    """How often 2 divides the product of the cores."""
    product = math.prod(cores)
    return (product & -product).bit_length() - 1


def _dct(n: int) -> Tensor:
    """Orthonormal DCT-II: row f is cos(π f (2t + 1) / 2n), normalised."""
    f, t = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    Q = torch.cos(math.pi / (2 * n) * f * (2 * t + 1)) * math.sqrt(2 / n)
    Q[0] = 1 / math.sqrt(n)
    return Q


def _sylvester(n: int) -> Tensor:
    H = torch.ones(1, 1, dtype=torch.int8)
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    while len(H) < n:
        H = torch.kron(two, H)
    return H


def _paley1(q: int) -> Tensor:
    """Order q + 1 for q = 3 mod 4: I plus a skew conference matrix."""
    H = torch.ones(q + 1, q + 1, dtype=torch.int8)
    H[1:, 0] = -1
    H[1:, 1:] = quadratic_character(q)
    return H.fill_diagonal_(1)


def _paley2(q: int) -> Tensor:
    """Order 2(q + 1) for q = 1 mod 4, from a symmetric conference matrix C."""
    C = torch.ones(q + 1, q + 1, dtype=torch.int8).fill_diagonal_(0)
    C[1:, 1:] = quadratic_character(q)
    on = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(C, on) + torch.kron(torch.eye(q + 1, dtype=torch.int8), diagonal)


def _williamson(m: int) -> Tensor:
    """Four symmetric sequences, int8 [4, m]."""
    half = torch.arange((m - 1) // 2)
    a = torch.ones(4, m, dtype=torch.int8)
    for row, mask in zip(a, WILLIAMSON[m]):
        row[1 + half] = (1 - 2 * (mask >> half & 1)).to(torch.int8)
        row[m - 1 - half] = row[1 + half]
    return a


def _turyn(m: int) -> Tensor:
    """Four sequences, int8 [4, m], from Turyn-type sequences by way of T-sequences.

    T-sequences (Z,0,0), (0,W,0), (0,0,(X+Y)/2), (0,0,(X−Y)/2) have autocorrelations that add up to
    zero and one nonzero element a place; their sums with the signs of a Hadamard matrix of order 4
    are what the array needs.
    """
    digits = TURYN[m]
    places = [f"{int(d, 16):04b}" for d in digits[:-1]] + [f"{int(digits[-1], 16):03b}"]
    X, Y, Z = (torch.tensor([1 - 2 * int(p[i]) for p in places]) for i in range(3))
    W = torch.tensor([1 - 2 * int(p[3]) for p in places[:-1]])
    T = torch.zeros(4, m, dtype=torch.long)
    n = len(X)
    T[0, :n], T[1, n : 2 * n - 1] = Z, W
    T[2, 2 * n - 1 :], T[3, 2 * n - 1 :] = (X + Y) // 2, (X - Y) // 2
    return (_sylvester(4).long() @ T).to(torch.int8)


def _goethals_seidel(sequences: Tensor) -> Tensor:
    """Hadamard matrix of order 4m from four ±1 sequences [4, m] whose periodic autocorrelations add
    up to zero."""
    m = sequences.shape[1]
    t = torch.arange(m)
    A, B, C, D = sequences[:, (t - t[:, None]) % m]
    BR, CR, DR = (M.flip(1) for M in (B, C, D))
    BtR, CtR, DtR = (M.T.flip(1) for M in (B, C, D))
    rows = [(A, BR, CR, DR), (-BR, A, DtR, -CtR), (-CR, -DtR, A, BtR), (-DR, CtR, -BtR, A)]
    return torch.cat([torch.cat(row, 1) for row in rows])
