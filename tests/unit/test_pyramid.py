"""Pyramid codes: numbering, the exact search, lengths, rates."""

import itertools
import math

import pytest
import torch
from pydantic import ValidationError

from tests.support.gaussian import gaussian, generator
from vqllm.codecs import CODECS, pyramid_design
from vqllm.codecs.search import pyramid as pyramid_nearest
from vqllm.codecs.search import pyramid_weighted
from vqllm.errors import RecipeError
from vqllm_kernels.pyramid import reference
from vqllm_kernels.pyramid.spec import PyramidSpec

SMALL = [(2, 5), (3, 4), (4, 1), (4, 9), (5, 3), (8, 3)]
WIDE = [(16, 49), (32, 21), (32, 97), (64, 42), (128, 27)]


def build(**options):
    return CODECS.get("pyramid").model_validate({"type": "pyramid", **options})


def all_vectors(dim, pulses):
    """Every vector with these pulses, int64 [N, dim], coordinate by coordinate."""
    vectors = [((), pulses)]
    for _ in range(dim):
        vectors = [((*v, y), k - abs(y)) for v, k in vectors for y in range(-k, k + 1)]
    return torch.tensor(sorted(v for v, left in vectors if left == 0))


def random_numbers(dim, pulses, num):
    """Digits of numbers below the number of directions, [num] each."""
    limit = reference.num_directions(dim, pulses)
    num_digits = -(-limit.bit_length() // reference.DIGIT_BITS)
    top = limit >> reference.DIGIT_BITS * (num_digits - 1)
    assert top > 1, "the top digit is drawn below that of the limit"
    rng = generator()
    digits = [torch.randint(1 << reference.DIGIT_BITS, (num,), generator=rng)] * (num_digits - 1)
    return [*digits, torch.randint(top, (num,), generator=rng)]


def integer(digits, n):
    return sum(int(digit[n]) << reference.DIGIT_BITS * i for i, digit in enumerate(digits))


def number_by_definition(vector):
    """The sum in the docstring of the format, in Python's integers."""
    total, dim = 0, len(vector)
    for i, y in enumerate(vector):
        e, j = dim - 1 - i, sum(map(abs, vector[i + 1 :]))
        below = sum(count(e, k) for k in range(j))
        total += 2 * below + (y < 0) * count(e, j)
    return total


def count(dim, pulses):
    return reference.num_directions(dim, pulses) if dim else int(pulses == 0)


def test_numbers_of_directions():
    for dim, pulses in SMALL:
        assert reference.num_directions(dim, pulses) == len(all_vectors(dim, pulses))
    for d, k in itertools.product(range(1, 20), range(1, 20)):
        assert count(d, k) == count(d - 1, k) + count(d - 1, k - 1) + count(d, k - 1)


def test_the_order_of_the_smallest_code():
    vectors = reference.vector_of([torch.arange(4)], 2, 1).T
    assert vectors.tolist() == [[1, 0], [-1, 0], [0, 1], [0, -1]]


@pytest.mark.parametrize(("dim", "pulses"), SMALL)
def test_numbers_are_a_bijection_over_the_whole_range(dim, pulses):
    limit = reference.num_directions(dim, pulses)
    vectors_DN = reference.vector_of([torch.arange(limit)], dim, pulses)
    assert torch.equal(vectors_DN.T.unique(dim=0), all_vectors(dim, pulses))
    assert torch.equal(reference.number_of(vectors_DN, pulses)[0], torch.arange(limit))
    for n in (0, 1, limit // 3, limit - 1):
        assert number_by_definition(vectors_DN[:, n].tolist()) == n


@pytest.mark.parametrize(
    ("dim", "pulses", "num"), [(16, 11, 1 << 20), *((*w, 1 << 14) for w in WIDE)]
)
def test_numbers_are_a_bijection_at_random(dim, pulses, num):
    digits = random_numbers(dim, pulses, num)
    for part in zip(*(digit.split(1 << 14) for digit in digits)):
        vectors_DN = reference.vector_of(list(part), dim, pulses)
        assert bool((vectors_DN.abs().sum(0) == pulses).all())
        again = reference.number_of(vectors_DN, pulses)
        assert all(torch.equal(a, b) for a, b in zip(again, part))
    for n in range(5):
        assert number_by_definition(vectors_DN[:, n].tolist()) == integer(part, n)


@pytest.mark.parametrize(("dim", "pulses"), WIDE)
def test_numbers_at_the_edges(dim, pulses):
    """Next to every number at which the first coordinate changes, and at both ends."""
    limit = reference.num_directions(dim, pulses)
    edges = [2 * sum(count(dim - 1, k) for k in range(j)) for j in range(pulses + 1)]
    numbers = sorted({n for e in [*edges, limit] for n in (e - 1, e, e + 1) if 0 <= n < limit})
    mask = (1 << reference.DIGIT_BITS) - 1
    digits = [
        torch.tensor([n >> reference.DIGIT_BITS * i & mask for n in numbers])
        for i in range(-(-limit.bit_length() // reference.DIGIT_BITS))
    ]
    vectors_DN = reference.vector_of(digits, dim, pulses)
    assert bool((vectors_DN.abs().sum(0) == pulses).all())
    again = reference.number_of(vectors_DN, pulses)
    assert [integer(again, n) for n in range(len(numbers))] == numbers


@pytest.mark.parametrize(("dim", "pulses"), [(16, 11), *WIDE])
def test_vectors_with_few_coordinates_come_back(dim, pulses):
    """Their numbers are sums of few entries of the table, at which the search for one turns."""
    y_ND = torch.zeros(4000, dim, dtype=torch.int64)
    for part_ND, num in zip(y_ND.split(1000), (1, 2, 3, 5)):
        place_NM = torch.rand(1000, dim, generator=generator(num)).argsort(1)[:, :num]
        share_NM = torch.rand(1000, num, generator=generator(num + 9)) * (pulses / num)
        share_NM = share_NM.to(torch.int64)
        share_NM[:, 0] += pulses - share_NM.sum(1)
        sign_NM = 2 * torch.randint(2, share_NM.shape, generator=generator(num + 19)) - 1
        part_ND.scatter_(1, place_NM, share_NM * sign_NM)
    number = reference.number_of(y_ND.T, pulses)
    assert torch.equal(reference.vector_of(number, dim, pulses), y_ND.T)
    assert number_by_definition(y_ND[3500].tolist()) == integer(number, 3500)


@pytest.mark.parametrize("levels", [1, 2, 3, 11, 16, 255, 256])
@pytest.mark.parametrize(("dim", "pulses"), [(4, 9), (16, 11), (16, 48), (32, 90)])
def test_number_and_level_share_a_code(dim, pulses, levels):
    bits = reference.tile_bits(dim, pulses, levels)
    limit = reference.num_directions(dim, pulses)
    assert 1 << bits - 1 < limit * levels <= 1 << bits
    number = random_numbers(dim, pulses, 500)
    level_N = torch.randint(levels, (500,), generator=generator(1))
    codes_NM = reference.join(number, level_N, levels, bits)
    assert codes_NM.shape[1] == -(-bits // 16)
    assert int(codes_NM.min()) >= 0
    assert int(codes_NM[:, -1].max()) < 1 << (bits - 1) % 16 + 1
    code = sum(int(symbol) << 16 * m for m, symbol in enumerate(codes_NM[0]))
    assert code == integer(number, 0) * levels + int(level_N[0])
    again, level_again_N = reference.split(codes_NM, levels)
    assert torch.equal(level_again_N, level_N)
    assert all(torch.equal(a, b) for a, b in zip(again, number))


@pytest.mark.parametrize(("dim", "pulses", "levels"), [(16, 11, 3), (32, 21, 6), (5, 4, 7)])
def test_unused_codes_are_the_last_direction(dim, pulses, levels):
    bits = reference.tile_bits(dim, pulses, levels)
    widths = [min(16, bits - low) for low in range(0, bits, 16)]
    codes_1M = torch.tensor([[(1 << width) - 1 for width in widths]], dtype=torch.int32)
    weights = reference.decode_tiles(codes_1M, torch.ones(levels), dim, pulses)
    last = torch.zeros(1, dim)
    last[0, -1] = -1
    assert torch.equal(weights, last)


def awkward(dim):
    """Gaussian tiles, and tiles with ties, zeros, spikes, tiny and huge weights."""
    x_NE = gaussian(1500, dim)
    x_NE[:200] = x_NE[:200] ** 3
    x_NE[200:300] = x_NE[200:300].round()
    x_NE[300:320] = 1.0
    x_NE[320:400] *= torch.randint(2, (80, dim), generator=generator(1))
    x_NE[400:420] *= 1e-30
    x_NE[420:440] *= 1e30
    x_NE[440:450] = 0
    return x_NE


def cosine(x_NE, y_EN):
    x_EN, y_EN = x_NE.double().T, y_EN.double()
    norm_N = x_EN.norm(dim=0).clamp(min=1e-300)
    return (x_EN * y_EN).sum(0) / (norm_N * y_EN.norm(dim=0))


@pytest.mark.parametrize(("dim", "pulses"), [*SMALL, (3, 20), (6, 5), (8, 4)])
def test_search_equals_brute_force(dim, pulses):
    x_NE = awkward(dim)
    y_EN = pyramid_nearest.nearest(x_NE, pulses)
    assert torch.equal(y_EN, y_EN.round())
    assert bool((y_EN.abs().sum(0) == pulses).all())
    positive_KE = all_vectors(dim, pulses).double()
    positive_KE = positive_KE[(positive_KE >= 0).all(1)]
    positive_KE /= positive_KE.norm(dim=1, keepdim=True)
    size_NE = x_NE.double().abs()
    size_NE /= size_NE.norm(dim=1, keepdim=True).clamp(min=1e-300)
    ideal_N = (size_NE @ positive_KE.T).amax(1)
    torch.testing.assert_close(cosine(x_NE, y_EN), ideal_N, rtol=0, atol=1e-7)


def greedy(x_NE, pulses):
    """floor(K |x| / Σ|x|), then one pulse at a time where it raises the cosine most."""
    x_EN = x_NE.double().abs().T
    y_EN = (x_EN * pulses / x_EN.sum(0)).floor()
    while bool((short_N := y_EN.sum(0) < pulses).any()):
        product_N, square_N = (x_EN * y_EN).sum(0), (y_EN * y_EN).sum(0)
        score_EN = (product_N + x_EN) ** 2 / (square_N + 2 * y_EN + 1)
        y_EN.scatter_add_(0, score_EN.argmax(0)[None], short_N[None].double())
    return y_EN * x_NE.T.sign()


# What greedy placing of pulses costs, measured on 2^18 weights: 0.4, 2.0, 2.8, 0.2 and 1.2 %.
@pytest.mark.parametrize(
    ("dim", "pulses", "excess"),
    [(16, 10, 0.004), (16, 23, 0.020), (16, 48, 0.028), (32, 21, 0.002), (32, 48, 0.012)],
)
def test_search_against_greedy_pulses(dim, pulses, excess):
    x_NE = gaussian(4096, dim)
    exact = 1 - cosine(x_NE, pyramid_nearest.nearest(x_NE, pulses)) ** 2
    other = 1 - cosine(x_NE, greedy(x_NE, pulses)) ** 2
    assert bool((exact <= other + 1e-6).all())
    assert float(other.mean() / exact.mean()) - 1 == pytest.approx(excess, abs=0.004)


@pytest.mark.parametrize(("dim", "pulses"), [(16, 23), (32, 48)])
def test_no_scale_of_the_tile_rounds_to_a_nearer_vector(dim, pulses):
    """The candidates of all scales t, and the shifts that give K pulses, on a grid."""
    x_NE = gaussian(512, dim)
    found_N = cosine(x_NE, pyramid_nearest.nearest(x_NE, pulses))
    size_EN = x_NE.abs().T * (pulses / x_NE.abs().sum(1))
    for scale in torch.linspace(0.9, 1.2, 31):
        z_EN = scale * size_EN
        for shift in torch.linspace(0.3, 0.6, 31):
            y_EN = (z_EN + shift).floor() * x_NE.T.sign()
            right = y_EN.abs().sum(0) == pulses
            assert bool((cosine(x_NE, y_EN)[right] <= found_N[right] + 1e-6).all())


@pytest.mark.parametrize(("dim", "pulses"), [(16, 30), (64, 10), (128, 27)])
def test_search_where_tiles_are_spiky_or_flat(dim, pulses):
    """Here the bounds and the cases of the search matter that Gaussian tiles do not come near."""
    noise_NE = gaussian(100, dim)
    spike_NE = torch.zeros(100, dim).scatter_(1, torch.arange(100)[:, None] % dim, 1)
    sparse_NE = noise_NE * (gaussian(100, dim, seed=1) > 1.2)
    sparse_NE[:, 0] += 1e-3
    tiles = [noise_NE**9, spike_NE, spike_NE + 0.05 * noise_NE, sparse_NE, 1 + 0.1 * noise_NE]
    x_NE = torch.cat(tiles)
    y_EN = pyramid_nearest.nearest(x_NE, pulses)
    assert bool((y_EN.abs().sum(0) == pulses).all())
    size_EN = x_NE.abs().T / x_NE.norm(dim=1)
    found_N = cosine(size_EN.T, y_EN.abs())
    for t in torch.logspace(math.log10(0.3 * pulses / dim**0.5), math.log10(10 * pulses), 60):
        other_EN = pyramid_nearest._nearest_at(size_EN, torch.full((len(x_NE),), float(t)), pulses)
        assert bool((cosine(size_EN.T, other_EN) <= found_N + 1e-6).all())


def test_a_tile_is_coded_alike_in_any_company():
    x_NE = awkward(16)
    together_EN = pyramid_nearest.nearest(x_NE, 11)
    alone = [pyramid_nearest.nearest(part_NE, 11) for part_NE in x_NE.split(333)]
    assert torch.equal(torch.cat(alone, 1), together_EN)
    assert torch.equal(pyramid_nearest.nearest(x_NE.flip(0), 11).flip(1), together_EN)


def test_encode_finds_the_nearest_of_all_codes():
    codec = build(dim=4, pulses=3, levels=5)
    X_IJE = gaussian(600, 4, seed=3)[None]
    state = codec.fit(X_IJE, None, generator())
    bits = codec.spec().tile_bits
    number_of_codes = reference.num_directions(4, 3) * 5
    every = torch.arange(number_of_codes, dtype=torch.int32)[None, :, None]
    words_KE = codec.decode(every, state)[0]
    assert number_of_codes <= 1 << bits
    assert len(words_KE.unique(dim=0)) == number_of_codes
    ideal_N = torch.cdist(X_IJE[0].double(), words_KE.double()).amin(1)
    gap_NE = codec.decode(codec.encode(X_IJE, state), state)[0] - X_IJE[0]
    torch.testing.assert_close(gap_NE.double().norm(dim=1), ideal_N, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("spike", "most"), [(0.0, 1.002), (1.0, 1.05), (30.0, 1.6)])
def test_weighted_search_is_close_to_exact(spike, most):
    dim, pulses = 5, 4
    x_EN = gaussian(800, dim).T.contiguous()
    factor_EE, direction_E = gaussian(dim, dim, seed=1), gaussian(1, dim, seed=2)[0]
    Q_EE = factor_EE @ factor_EE.T / dim + torch.eye(dim)
    Q_EE = Q_EE + spike * torch.outer(direction_E, direction_E)

    def error(y_EN):
        """With the best length, by the formula of the projection."""
        x, y, Q = x_EN.double(), y_EN.double(), Q_EE.double()
        product, square = (x * (Q @ y)).sum(0), (y * (Q @ y)).sum(0)
        return ((x * (Q @ x)).sum(0) - product.clamp(min=0) ** 2 / square).clamp(min=0)

    plain_EN = pyramid_nearest.nearest(x_EN.T, pulses)
    y_EN, length_N = pyramid_weighted.nearest(x_EN, plain_EN, Q_EE)
    assert bool((y_EN.abs().sum(0) == pulses).all())
    gap_EN = (x_EN - y_EN / y_EN.norm(dim=0) * length_N).double()
    torch.testing.assert_close(
        (gap_EN * (Q_EE.double() @ gap_EN)).sum(0), error(y_EN), rtol=1e-3, atol=1e-4
    )
    ideal = torch.stack([error(v[:, None]) for v in all_vectors(dim, pulses)]).amin(0).mean()
    found, plain = error(y_EN).mean(), error(plain_EN).mean()
    assert float(ideal) * 0.999 <= float(found) < float(plain)
    assert float(found / ideal) < most


def test_weighted_search_keeps_the_pulses_of_zeros_and_of_weights_alone():
    """Where the score does not depend on the sign of a new pulse, it has a sign all the same."""
    x_EN = gaussian(300, 8).T * torch.randint(2, (8, 300), generator=generator(1))
    x_EN[:, :5] = 0
    plain_EN = pyramid_nearest.nearest(x_EN.T, 9)
    y_EN, length_N = pyramid_weighted.nearest(x_EN, plain_EN, torch.diag(torch.logspace(-2, 2, 8)))
    assert bool((y_EN.abs().sum(0) == 9).all())
    assert bool(length_N.isfinite().all())


def test_lengths_of_a_single_level_are_the_mean_norm():
    for dim in (2, 16, 128):
        mean = math.sqrt(2) * math.exp(math.lgamma((dim + 1) / 2) - math.lgamma(dim / 2))
        levels, error = pyramid_design._chi_levels(dim, 1)
        assert float(levels) == pytest.approx(mean, rel=1e-6)
        assert error == pytest.approx(dim - mean**2, rel=1e-4)


@pytest.mark.parametrize(("num", "error"), [(2, 0.3634), (3, 0.1902), (4, 0.1175), (8, 0.0345)])
def test_lengths_of_large_tiles_are_those_of_a_gaussian(num, error):
    """The norm of many Gaussians has nearly a Gaussian density of variance 1/2; Max, 1960."""
    assert 2 * pyramid_design._chi_levels(128, num)[1] == pytest.approx(error, rel=0.01)


def test_levels_are_the_best_for_gaussian_weights():
    codec = build(dim=16, bits=2)
    X_IJE = gaussian(1 << 13, 16, seed=5)[None]
    state = codec.fit(X_IJE, None, generator())

    def error(factor):
        scaled = {"levels": state["levels"] * factor}
        return float((codec.decode(codec.encode(X_IJE, scaled), scaled) - X_IJE).square().mean())

    assert error(1.0) < min(error(0.98), error(1.02))


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"dim": 16, "bits": 2}, 0.01),
        ({"dim": 16, "bits": 3}, 0.01),
        ({"dim": 32, "bits": 1.5}, 0.01),
        ({"dim": 8, "bits": 2.25}, 0.02),
    ],
)
def test_expected_error_is_what_is_measured(options, tolerance):
    codec = build(**options)
    spec = codec.spec()
    X_IJE = gaussian((1 << 18) // spec.dim, spec.dim, seed=6)[None]
    state = codec.fit(X_IJE, None, generator())
    mse = float((codec.decode(codec.encode(X_IJE, state), state) - X_IJE).square().mean())
    expected = pyramid_design.expected_error(spec.dim, spec.pulses, spec.levels)
    assert mse == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(("dim", "bits"), [(16, 32), (16, 35), (8, 24), (32, 64), (5, 9), (3, 40)])
def test_the_best_pulses_and_levels_of_a_rate(dim, bits):
    pulses, levels = pyramid_design.choose(dim, bits)
    assert reference.tile_bits(dim, pulses, levels) <= bits
    chosen = pyramid_design.expected_error(dim, pulses, levels)
    for other in range(max(pulses - 3, 1), min(pulses + 4, reference.MAX_PULSES + 1)):
        room = min((1 << bits) // reference.num_directions(dim, other), 256)
        if room:
            assert chosen <= pyramid_design.expected_error(dim, other, room)


@pytest.mark.parametrize("bits", [1, 1.5, 2, 2.1, 2.25, 3, 3.4, 4])
def test_stored_bits_are_those_asked_for(bits):
    codec = build(dim=32, bits=bits)
    whole = math.floor(32 * bits + 1e-6)
    assert codec.spec().tile_bits <= whole
    assert codec.spec().tile_bits >= whole - 1
    assert codec.bits(7, 4096).codes == 7 * 8 * -(-128 * codec.spec().tile_bits // 8)


def test_zeros_and_constants():
    for codec, value in itertools.product((build(bits=2), build(dim=32, bits=3)), (0.0, 0.5, -2.0)):
        X_IJE = torch.full((3, 4, codec.dim), value)
        state = codec.fit(X_IJE, None, generator())
        decoded = codec.decode(codec.encode(X_IJE, state), state)
        assert bool(decoded.isfinite().all())
        if value:
            assert float((decoded / value - 1).square().mean()) < 0.4
        else:
            assert float(decoded.abs().max()) < 1e-20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0.25}, r"bits 0.25, 4 for 16 weights; .* allowed are bits from 0.3125 to 8"),
        ({"bits": 5, "dim": 32}, r"bits 5, 160 for 32 weights; 32 weights take 6..128 bits"),
        ({"pulses": 5}, "pulses 5 without levels; give both, or `bits` alone"),
        ({"levels": 5}, "levels 5 without pulses"),
        ({"bits": 2, "pulses": 5, "levels": 4}, "bits 2 and pulses 5; give `bits`, or"),
        (
            {"dim": 64, "pulses": 45, "levels": 16},
            "45 pulses; 64 weights with 16 levels have 1..40",
        ),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(RecipeError, match=message):
        build(**options)


@pytest.mark.parametrize(
    "options", [{"dim": 1}, {"dim": 129}, {"bits": 0}, {"pulses": 0, "levels": 1}]
)
def test_options_out_of_range(options):
    with pytest.raises(ValidationError):
        build(**options)


def test_default_is_two_bits():
    assert build().bits(1, 4096).codes == 2 * 4096


@pytest.mark.parametrize(
    "fields",
    [{"dim": 1}, {"dim": 200}, {"levels": 0}, {"levels": 257}, {"pulses": 0}, {"pulses": 10**6}],
)
def test_formats_that_cannot_be(fields):
    with pytest.raises(ValueError, match=r"pyramid-v1: .*(allowed are|have 1\.\.)"):
        PyramidSpec(**{"dim": 16, "pulses": 11, "levels": 3, **fields})


def test_packed_rows_of_another_size_are_refused():
    spec = PyramidSpec(dim=16, pulses=11, levels=3)
    tensors = {"codes": torch.zeros(3, 9, dtype=torch.uint8), "levels": torch.ones(3)}
    with pytest.raises(ValueError, match=r"\[..., 9\], expected uint8 \[..., 8\]"):
        spec.decode(tensors, 3, 32)
