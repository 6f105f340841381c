"""The numbering of the points of the Leech lattice, and the search for the nearest."""

import itertools
import math

import pytest
import torch
from pydantic import ValidationError

from tests.support.gaussian import generator
from tests.support.params import slow
from vqllm.codecs import CODECS
from vqllm.errors import RecipeError
from vqllm_kernels import formats, layout
from vqllm_kernels.leech import reference
from vqllm_kernels.leech.spec import LeechSpec

FITTED = CODECS.get("leech")().spec()


def gaussian(num, seed=0):
    return torch.randn(num, 24, generator=generator(seed))


def codec(**options):
    return CODECS.get("leech").model_validate({"type": "leech", **options})


def fitted(X_IJE, **options):
    built = codec(**options)
    return built, built.fit(X_IJE, None, generator())


def symbols_of(number, index_bits):
    return [number >> shift & 0xFFF for shift in range(0, index_bits, 12)]


def random_symbols(num, spec, seed=0):
    """Numbers below that of the origin, all equally likely."""
    end = reference.origin(spec.shells) >> 12
    high = torch.randint(end, (num,), generator=generator(seed))
    low = torch.randint(1 << 12, (num,), generator=generator(seed + 1))
    shifts = range(0, spec.index_bits - 12, 12)
    return torch.stack([low, *(high >> shift & 0xFFF for shift in shifts)], 1)


def theta_series(num):
    """Points of the shells 0..num − 1: 65520/691 (σ11(m) − τ(m)), with Ramanujan's τ."""
    product = [1] + [0] * num
    for n in range(1, num):
        for _ in range(24):
            for i in range(num, n - 1, -1):
                product[i] -= product[i - n]
    tau = [0, *product]
    sigma = [sum(d**11 for d in range(1, m + 1) if m % d == 0) for m in range(num)]
    return [1] + [65520 * (sigma[m] - tau[m]) // 691 for m in range(1, num)]


def test_golay_code():
    words = reference.golay_words()
    weights = [word.bit_count() for word in words]
    assert {w: weights.count(w) for w in set(weights)} == {0: 1, 8: 759, 12: 2576, 16: 759, 24: 1}
    basis = [words[1 << i] for i in range(12)]
    for number in (77, 1234, 4095):
        chosen = [word for i, word in enumerate(basis) if number >> i & 1]
        total = 0
        for word in chosen:
            total ^= word
        assert total == words[number]
    assert all((a & b).bit_count() % 2 == 0 for a, b in itertools.product(basis, repeat=2))


def test_shells_have_the_sizes_of_the_theta_series():
    series = theta_series(reference.MAX_SHELL + 1)
    assert series[:5] == [1, 0, 196560, 16773120, 398034000]
    for shell in range(2, reference.MAX_SHELL + 1):
        assert reference.shell_size(shell) == series[shell]


@pytest.mark.slow
def test_the_minimal_vectors_are_all_of_them():
    """Conway and Sloane, chapter 4, section 11: 1104 + 97152 + 98304 vectors in three shapes."""
    shells = (2,)
    end = reference.origin(shells)
    number = torch.arange(end)
    X, level = reference.points(torch.stack((number & 0xFFF, number >> 12), 1), shells)
    is_point = X.any(1)
    X, level, number = X[is_point], level[is_point], number[is_point]
    assert len(X) == len(X.to(torch.int8).unique(dim=0)) == 196560
    shapes, counts = X.abs().sort(1).values.unique(dim=0, return_counts=True)
    assert {tuple(s.int().tolist()): n for s, n in zip(shapes, counts.tolist())} == {
        (0,) * 22 + (4, 4): 1104,
        (0,) * 16 + (2,) * 8: 97152,
        (1,) * 23 + (3,): 98304,
    }
    assert torch.equal((X**2).sum(1), torch.full((196560,), 32.0))
    products = (X[::37] @ X[::41].T / 8).unique().tolist()
    assert products == [-4, -2, -1, 0, 1, 2, 4]
    symbols = reference.numbers(X, level, shells, 24)
    assert torch.equal(symbols[:, 0] + (symbols[:, 1] << 12), number.to(torch.int32))


@pytest.mark.parametrize(
    ("num", "spec"),
    [
        slow(1 << 20, FITTED),
        (1 << 16, FITTED),
        (1 << 16, codec(bits=1).spec()),
        slow(1 << 16, codec(bits=1.5).spec()),
        slow(1 << 16, codec(bits=2.5).spec()),
        (1 << 16, codec(bits=3).spec()),
        (1 << 14, LeechSpec(index_bits=72, shells=tuple(range(2, 54)))),
    ],
    ids=lambda value: str(value.index_bits) if isinstance(value, LeechSpec) else None,
)
def test_numbers_and_points_are_the_same(num, spec):
    symbols = random_symbols(num, spec)
    X, level = reference.points(symbols, spec.shells)
    is_point = X.any(1)
    assert float(is_point.float().mean()) > 0.999
    shell = torch.tensor(spec.shells)[level]
    assert torch.equal((X**2).sum(1)[is_point], 16.0 * shell[is_point])
    again = reference.numbers(X, level, spec.shells, spec.index_bits)
    assert torch.equal(again[is_point], symbols[is_point].to(torch.int32))


def test_the_first_and_the_last_number_of_every_class():
    for shells in (FITTED.shells, (53, 2)):
        start, index_bits = 0, 72
        for level, shell in enumerate(shells):
            for kind in range(6):
                size = reference.class_size(kind, shell)
                if not size:
                    continue
                numbers = [start, start + size - 1]
                symbols = torch.tensor([symbols_of(n, index_bits) for n in numbers])
                X, levels = reference.points(symbols, shells)
                assert levels.tolist() == [level, level]
                assert (X**2).sum(1).tolist() == [16 * shell] * 2
                again = reference.numbers(X, levels, shells, index_bits)
                assert torch.equal(again, symbols.to(torch.int32))
                start += -(-size // 4096) * 4096
        assert reference.origin(shells) == start


def slow_point(number, shells):
    """The point of a number, from the text of the reference's docstring."""
    words = reference.golay_words()

    def costs(kind, inside):
        if kind == "odd":
            return [k * (k + 1) // 2 for k in range(20)]
        return [k * (k + 1) if inside else ((k + 1) // 2) ** 2 for k in range(20)]

    def count(places, budget, kind):
        ways = [1] + [0] * budget
        for inside in places:
            ways = [
                sum(ways[n - c] for c in costs(kind, inside) if c <= n) for n in range(budget + 1)
            ]
        return ways[budget]

    def sequence(rank, places, budget, kind):
        found = []
        for i, inside in enumerate(places):
            own, k = costs(kind, inside), 0
            while True:
                left = budget - own[k]
                ways = count(places[i + 1 :], left, kind) if left >= 0 else 0
                if rank < ways:
                    break
                rank, k = rank - ways, k + 1
            found.append(k)
            budget -= own[k]
        return found

    start = 0
    for shell, kind in itertools.product(shells, ("odd", 0, 8, 12, 16, 24)):
        if kind == "odd":
            places, budget, members, num_signs = [False] * 24, 2 * shell - 3, None, 4096
        else:
            places, budget = [True] * kind + [False] * (24 - kind), shell - kind // 4
            members = [w for w in words if w.bit_count() == kind]
            num_signs = 2 ** max(kind - 1, 0)
        if budget < 0 or (kind == 0 and shell % 2):
            continue
        size = count(places, budget, kind) * num_signs * (1 if kind == "odd" else len(members))
        if number < start + size:
            r = number - start
            break
        start += -(-size // 4096) * 4096
    else:
        return [0] * 24
    if kind == "odd":
        word, k = words[r % 4096], sequence(r // 4096, places, budget, kind)
        return [(-1) ** (k[i] + (word >> i & 1)) * (2 * k[i] + 1) for i in range(24)]
    signs, r = r % num_signs, r // num_signs
    word, k = members[r % len(members)], sequence(r // len(members), places, budget, kind)
    inside = [i for i in range(24) if word >> i & 1]
    X = [0] * 24
    for j, i in enumerate(inside):
        X[i] = 2 * (2 * k[j] + 1) * (-1 if signs >> j & 1 else 1)
    for j, i in enumerate(i for i in range(24) if not word >> i & 1):
        symbol = k[kind + j]
        X[i] = (4 if symbol % 2 else -4) * ((symbol + 1) // 2)
    if sum(X) % 8:
        X[inside[-1]] *= -1
    return X


@pytest.mark.parametrize("shells", [(2, 3), (5, 4, 4, 9)])
def test_the_bits_of_a_number(shells):
    spec = LeechSpec(index_bits=48, shells=shells)
    symbols = random_symbols(25, spec, seed=4)
    X, _ = reference.points(symbols, shells)
    for row, point in zip(symbols.tolist(), X.int().tolist()):
        number = sum(symbol << 12 * i for i, symbol in enumerate(row))
        assert slow_point(number, shells) == point


def test_numbers_that_are_left_over_stand_for_the_origin():
    end = reference.origin(FITTED.shells)
    numbers = [end, end + 1, (1 << 48) - 1]
    X, level = reference.points(torch.tensor([symbols_of(n, 48) for n in numbers]), FITTED.shells)
    assert not X.any()
    assert not level.any()
    assert reference.numbers(X[:1], level[:1], FITTED.shells, 48).tolist() == [symbols_of(end, 48)]


@pytest.mark.parametrize(
    "change",
    [[(0, 1)], [(0, 4)], [(0, 2), (1, 2)], [(0, 8)]],
    ids=["parity", "sum", "word", "shell"],
)
def test_vectors_that_are_no_points_have_no_number(change):
    X, level = reference.points(torch.tensor([[5, 6, 7, 8]]), FITTED.shells)
    for i, step in change:
        X[0, i] += step
    with pytest.raises(ValueError, match="1 of 1 vectors are no points"):
        reference.numbers(X, level, FITTED.shells, 48)


def best_products(x_E, max_shell):
    """The largest x·X over each whole shell, by dynamic programming over the coordinates."""
    bits_WE = torch.tensor(reference.golay_words())[:, None] >> torch.arange(24) & 1
    x_E = x_E.double()
    budget = 2 * max_shell - 3
    odd_WB = torch.full((4096, budget + 1), -math.inf, dtype=torch.float64)
    odd_WB[:, 0] = 0
    # Even points by the sum so far, and by whether ΣX_i / 4 needs another odd term.
    even_WBP = torch.full((4096, max_shell + 1, 2), -math.inf, dtype=torch.float64)
    even_WBP[:, 0, 0] = 0

    def shifted(value, by):
        pad = (0, 0) * (value.dim() - 2) + (by, 0)
        return torch.nn.functional.pad(value, pad, value=-math.inf)[:, : value.shape[1]]

    for e in range(24):
        one_W = bits_WE[:, e] == 1
        terms = []
        for k in range(20):
            if k * (k + 1) // 2 <= budget:
                size = (2 * k + 1) * x_E[e] * (-1) ** k
                gain_W1 = torch.where(one_W, -size, size)[:, None]
                terms.append(shifted(odd_WB, k * (k + 1) // 2) + gain_W1)
        odd_WB = torch.stack(terms).amax(0)
        inside, outside = [], []
        for k in range(8):
            for sign in (1, -1):
                odd = (sign * (2 * k + 1)) % 4 == 3
                if k * (k + 1) <= max_shell:
                    moved = shifted(even_WBP, k * (k + 1)) + sign * 2 * (2 * k + 1) * x_E[e]
                    inside.append(moved.flip(2) if odd else moved)
                if k * k <= max_shell:
                    moved = shifted(even_WBP, k * k) + sign * 4 * k * x_E[e]
                    outside.append(moved.flip(2) if k % 2 else moved)
        even_WBP = torch.where(
            one_W[:, None, None], torch.stack(inside).amax(0), torch.stack(outside).amax(0)
        )
    best = [-math.inf] * (max_shell + 1)
    weight_W = bits_WE.sum(1)
    for shell in range(2, max_shell + 1):
        best[shell] = float(odd_WB[:, 2 * shell - 3].max())
        for weight in (0, 8, 12, 16, 24):
            if shell >= weight // 4:
                even = even_WBP[weight_W == weight, shell - weight // 4, 0]
                best[shell] = max(best[shell], float(even.max()))
    return best


@pytest.mark.parametrize(
    ("options", "size"),
    [
        slow({}, [0.2, 0.6, 0.8, 1.0, 1.2, 1.4, 30.0]),
        ({"shape": "spherical"}, [0.5, 1.0, 1.4]),
        ({"shape": "shape-gain"}, [0.5, 1.0, 1.4]),
    ],
)
def test_search_finds_the_nearest_of_all_points(options, size):
    size = torch.tensor(size)
    x_NE = gaussian(len(size), seed=3)
    x_NE = x_NE / x_NE.norm(dim=1, keepdim=True) * 24**0.5 * size[:, None]
    built, state = fitted(gaussian(100)[None], **options)
    codes = built.encode(x_NE[None], state)
    found_N = (built.decode(codes, state)[0].double() - x_NE).square().sum(1)
    for x_E, found in zip(x_NE, found_N.tolist()):
        products = best_products(x_E, max(built.spec().shells))
        square = float(x_E.double().square().sum())
        ideal = square
        for shell, gain in zip(built.spec().shells, state["gains"].tolist()):
            ideal = min(ideal, square - 2 * gain * products[shell] + gain**2 * 16 * shell)
        assert found == pytest.approx(ideal, rel=1e-5)


def test_every_point_finds_itself():
    for bits in (1, 1.5, 2, 2.5, 3):
        built, state = fitted(gaussian(100)[None], bits=bits)
        spec = built.spec()
        codes = random_symbols(500, spec, seed=5)[None].to(torch.int32)
        again = built.encode(built.decode(codes, state), state)
        assert torch.equal(built.decode(again, state), built.decode(codes, state))


@pytest.mark.parametrize("spike", [0.0, 1.0, 20.0])
def test_search_in_a_norm(spike):
    """Close to the limit of a code with cells of any shape: the geometric mean of the axes."""
    x = gaussian(600)[None]
    built, state = fitted(x)
    factor, direction = gaussian(240, seed=1), gaussian(1, seed=2)[0]
    direction /= direction.norm()
    weight = factor.T @ factor / 240 + spike * torch.outer(direction, direction)

    def error(codes):
        gap = (built.decode(codes, state) - x)[0].double()
        return (gap @ weight.double() * gap).sum(1)

    nearest, found = error(built.encode(x, state)), error(built.encode(x, state, weight_E=weight))
    assert bool((found <= nearest + 1e-5).all())
    limit = float((torch.linalg.slogdet(weight.double())[1] / 24).exp())
    assert float(found.mean()) < 1.05 * limit * 0.0735 * 24
    scaled = built.encode(x, state, weight_E=100 * weight)
    assert torch.equal(scaled, built.encode(x, state, weight_E=weight))


def test_gains_of_any_sign_are_searched():
    x = gaussian(200)[None]
    built, state = fitted(x)
    flipped = {"gains": state["gains"] * (-1) ** torch.arange(len(state["gains"]))}
    error, flipped_error = (
        (built.decode(built.encode(x, s), s) - x).square().mean() for s in (state, flipped)
    )
    torch.testing.assert_close(flipped_error, error)
    nothing = {"gains": torch.zeros_like(state["gains"])}
    assert not built.decode(built.encode(x, nothing), nothing).any()


def test_zero_tiles_are_exact_among_others():
    x = gaussian(50)[None]
    x[0, 7] = 0
    built, state = fitted(x)
    assert not built.decode(built.encode(x, state), state)[0, 7].any()
    zeros = torch.zeros(2, 3, 24)
    _, state = fitted(zeros)
    assert not built.decode(built.encode(zeros, state), state).any()


def test_gains_are_proportional_to_the_weights_and_can_be_set():
    x = gaussian(64)[None]
    built, state = fitted(x)
    norms = 4 * torch.tensor(built.spec().shells).sqrt() * state["gains"] / x.square().mean().sqrt()
    torch.testing.assert_close(norms[:2], torch.tensor([4.421, 5.258]))
    torch.testing.assert_close(built.fit(3 * x, None, generator())["gains"], 3 * state["gains"])
    half = fitted(x, scale_factor=0.5)[1]["gains"]
    torch.testing.assert_close(half, 0.5 * state["gains"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1.75}, "1.75 bits with shape fitted; allowed are 1, 1.5, 2, 2.5, 3$"),
        ({"bits": 3, "shape": "shape-gain"}, "3 bits with shape shape-gain; allowed are 2$"),
        ({"bits": 4}, "less than or equal to 3"),
        ({"shape": "ball"}, "'fitted', 'spherical' or 'shape-gain'"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises((ValidationError, RecipeError), match=message):
        codec(**options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"index_bits": 50, "shells": [2]}, "50 bits a tile; allowed are the multiples of 12"),
        ({"index_bits": 84, "shells": [2]}, "from 24 to 72"),
        ({"index_bits": 24, "shells": [2, 3]}, "16969680 points, too many for 24 bits"),
        ({"index_bits": 48, "shells": []}, r"shells \[\]; needed are one or more of 2..53"),
        ({"index_bits": 48, "shells": [1, 5]}, "needed are one or more of 2..53"),
        ({"index_bits": 72, "shells": [54]}, "needed are one or more of 2..53"),
        ({"index_bits": 48}, "expected"),
    ],
)
def test_formats_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        formats.from_dict({"format": "leech-v1", **fields})


def test_tensors_of_another_shape_or_dtype_are_refused():
    built, state = fitted(gaussian(8).reshape(2, 4, 24))
    packed = built.pack(torch.zeros(2, 4, 4, dtype=torch.int32), state)
    assert packed["codes"].shape == (2, 24)
    wanted = built.spec().layout(2, 90)
    layout.check(packed, wanted, "whole")
    with pytest.raises(ValueError, match="damaged: codes is"):
        layout.check({**packed, "codes": packed["codes"][:, :23]}, wanted, "damaged")
    with pytest.raises(ValueError, match="damaged: gains is"):
        layout.check({**packed, "gains": packed["gains"][:1]}, wanted, "damaged")


def test_damaged_codes_decode_to_something_finite():
    built, state = fitted(gaussian(8)[None])
    packed = {"codes": torch.full((4, 30), 255, dtype=torch.uint8), **state}
    W = built.spec().decode(packed, 4, 120)
    assert W.shape == (4, 120)
    assert bool(W.isfinite().all())
