"""Which elements of a finite field are squares: all that Paley's matrices need to know of it.

An element of GF(p^k) is a polynomial of degree below k over the integers mod p, named by the
integer whose digits in base p are its coefficients, the constant term in the lowest digit.
"""

import itertools

import torch
from torch import Tensor


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q //= p
        k += 1
    return (p, k) if q == 1 else None


def quadratic_character(q: int) -> Tensor:
    """χ(a − b) for all elements a, b of GF(q): int8 [q, q], 0 on the diagonal.

    χ(x) is 0 for zero, 1 for a nonzero square and −1 otherwise. `q` is an odd prime power.
    """
    power = prime_power(q)
    if power is None or q % 2 == 0:
        raise ValueError(f"{q} is not an odd prime power")
    p, k = power
    modulus = _irreducible(p, k)
    digits = torch.stack([torch.arange(q) // p**i % p for i in range(k)])
    places = p ** torch.arange(k)

    chi = torch.full((q,), -1, dtype=torch.int8)
    chi[(_square(digits, modulus, p) * places[:, None]).sum(0)] = 1
    chi[0] = 0

    differences = (digits[:, :, None] - digits[:, None, :]) % p
    return chi[(differences * places[:, None, None]).sum(0)]


def _square(digits: Tensor, modulus: tuple[int, ...], p: int) -> Tensor:
    """Squares of polynomials [k, q], reduced by the monic `modulus`, lowest coefficient first."""
    k = len(digits)
    product = torch.zeros(2 * k - 1, digits.shape[1], dtype=torch.long)
    for i, j in itertools.product(range(k), repeat=2):
        product[i + j] += digits[i] * digits[j]
    for top in range(2 * k - 2, k - 1, -1):
        for i in range(k):
            product[top - k + i] -= product[top] * modulus[i]
        product %= p
    return product[:k] % p


def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """The first irreducible monic polynomial of degree k, coefficients lowest first."""
    for low in itertools.product(range(p), repeat=k):
        candidate = (*low, 1)
        divisors = (
            (*rest, 1)
            for degree in range(1, k // 2 + 1)
            for rest in itertools.product(range(p), repeat=degree)
        )
        if not any(_divides(divisor, candidate, p) for divisor in divisors):
            return candidate
    raise AssertionError(f"no irreducible polynomial of degree {k} over GF({p})")


def _divides(divisor: tuple[int, ...], dividend: tuple[int, ...], p: int) -> bool:
    """Whether a monic polynomial divides another over the integers mod p."""
    rest = list(dividend)
    while len(rest) >= len(divisor):
        lead, shift = rest[-1], len(rest) - len(divisor)
        for i, c in enumerate(divisor):
            rest[shift + i] = (rest[shift + i] - lead * c) % p
        rest.pop()
    return not any(rest)
