"""Learned lattices: the points, the search, the stream of bits, and what is learned."""

import itertools
import math

import pytest
import torch

from tests.support.gaussian import gaussian, generator
from vqllm.codecs import CODECS
from vqllm.codecs.search.learned_lattice import Lattice
from vqllm.core import tiles
from vqllm.errors import RecipeError
from vqllm_kernels.learned_lattice import reference
from vqllm_kernels.learned_lattice.spec import LearnedLatticeSpec

COMPANDINGS = ("none", "mu", "tanh")


def build(**options):
    return CODECS.get("learned_lattice").model_validate({"type": "learned_lattice", **options})


def laplacian(*shape, seed=0):
    uniform = torch.rand(shape, generator=generator(seed)) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs()) / math.sqrt(2)


def correlated(rows, cols, correlation, seed=0):
    """Each weight of a row is correlated with the one before it."""
    columns = list(gaussian(cols, rows, seed=seed))
    for i in range(1, cols):
        columns[i] = correlation * columns[i - 1] + (1 - correlation**2) ** 0.5 * columns[i]
    return torch.stack(columns, 1)


def mse(codec, W_RC, state=None, weight_E=None):
    X_IJE = tiles.to_tiles(W_RC, codec.tile)
    state = codec.fit(X_IJE, None, generator()) if state is None else state
    decoded = codec.decode(codec.encode(X_IJE, state, weight_E=weight_E), state)
    return float((decoded - X_IJE).square().mean())


def all_symbols(widths):
    axes = [torch.arange(1 << width, dtype=torch.int32) for width in widths]
    return torch.cartesian_prod(*axes).reshape(-1, len(widths))


def lattice(base, companding, widths, G_EE, mu=0.5):
    diagonal = bool((torch.diag(torch.diagonal(G_EE)) == G_EE).all())
    return Lattice(G_EE[None], torch.tensor([mu]), base, companding, widths, diagonal)


def points(own, codes_NE):
    y_NE = reference.coordinates(codes_NE, own.base, own.widths) @ own.G_PEE[0].T
    return reference.expand(y_NE, own.mu_P, own.companding)


def errors(own, x_NE, weight):
    """Of the code that is found, and the least of all codes, [N]."""
    found = points(own, own.nearest(x_NE.T[:, None].contiguous(), weight)[:, 0].T) - x_NE
    weight = torch.eye(x_NE.shape[1]) if weight is None else weight
    factor_EE = torch.linalg.cholesky(weight if weight.dim() == 2 else weight[:, 0, 0].diag())
    everything = points(own, all_symbols(own.widths)) @ factor_EE
    least = torch.cat(
        [
            torch.cdist(x, everything, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
            for x in (x_NE @ factor_EE).split(64)
        ]
    )
    return (found @ factor_EE).square().sum(1), least.square()


def test_e8_coordinates_are_all_points_of_the_shifted_lattice_in_a_cube():
    q = reference.coordinates(all_symbols((2,) * 8), "e8", (2,) * 8)
    assert len(q.unique(dim=0)) == 1 << 16
    assert float(q.abs().max()) == 1.75
    shifted = q - 0.25
    whole = (shifted == shifted.round()).all(1)
    half = (shifted + 0.5 == (shifted + 0.5).round()).all(1)
    assert bool((whole | half).all())
    assert int(whole.sum()) == 1 << 15
    assert bool((shifted.sum(1) % 2 == 0).all())
    both = torch.cat((q, -q)).unique(dim=0)
    assert len(both) == 1 << 16, "the code is symmetric"


def test_e8_with_components_of_different_widths():
    widths = (3, 2, 2, 1, 1, 1, 2, 1)
    q = reference.coordinates(all_symbols(widths), "e8", widths)
    assert len(q.unique(dim=0)) == 1 << sum(widths)
    assert (q.amax(0) == torch.tensor([(1 << width) / 2 - 0.25 for width in widths])).all()
    assert len(torch.cat((q, -q)).unique(dim=0)) == 1 << sum(widths)


def test_integer_coordinates():
    q = reference.coordinates(torch.tensor([[0, 0], [3, 1], [1, 1]]).int(), "integers", (2, 1))
    assert q.tolist() == [[-1.5, -0.5], [1.5, 0.5], [-0.5, 0.5]]


@pytest.mark.parametrize("companding", COMPANDINGS)
def test_expand_is_the_inverse_of_compress(companding):
    x = torch.linspace(-4, 4, 101)
    for mu in (0.02, 0.5, 1.0):
        y = reference.compress(x, torch.tensor(mu), companding)
        back = reference.expand(y, torch.tensor(mu), companding)
        torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
    assert bool(
        reference.expand(torch.tensor([-9.0, 9.0]), torch.tensor(1.0), companding).isfinite().all()
    )


@pytest.mark.parametrize("companding", COMPANDINGS[1:])
def test_little_curvature_is_none(companding):
    x, mu = torch.linspace(-2, 2, 9), torch.tensor(1e-2)
    torch.testing.assert_close(reference.compress(x, mu, companding) / mu, x, rtol=0.02, atol=0)


@pytest.mark.parametrize("companding", COMPANDINGS)
@pytest.mark.parametrize(
    ("base", "widths", "step"),
    [
        ("e8", (1,) * 8, 1.0),
        ("e8", (2, 1, 1, 3, 1, 1, 1, 2), 0.5),
        ("integers", (2, 3, 1), 0.5),
        ("integers", (5,), 0.1),
    ],
    ids=str,
)
def test_diagonal_lattices_are_searched_exactly(base, widths, step, companding):
    num = len(widths)
    own = lattice(base, companding, widths, torch.diag(step * torch.logspace(-0.1, 0.1, num)))
    x_NE = 1.3 * gaussian(500, num, seed=1)
    for weight in (None, torch.logspace(-1, 1, num)[:, None, None]):
        found, least = errors(own, x_NE, weight)
        if base == "e8" and companding != "none":
            assert float(found.mean()) < 1.01 * float(least.mean())
        else:
            torch.testing.assert_close(found, least, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("companding", "step", "mu"), [("none", 1.05, 1), ("tanh", 0.42, 0.52)])
def test_e8_at_two_bits_is_searched_exactly(companding, step, mu):
    own = lattice("e8", companding, (2,) * 8, step * torch.eye(8), mu)
    found, least = errors(own, gaussian(100, 8, seed=1), None)
    torch.testing.assert_close(found, least, rtol=1e-3, atol=1e-4)


def coupling(num, decay):
    return torch.tensor([[decay ** abs(i - j) for i in range(num)] for j in range(num)])


@pytest.mark.parametrize(("base", "bound"), [("e8", 1.02), ("integers", 1.05)])
def test_the_gap_of_the_search_with_a_weight_matrix(base, bound):
    num, widths = (8, (1,) * 8) if base == "e8" else (5, (2,) * 5)
    own = lattice(base, "tanh", widths, 0.45 * torch.eye(num))
    x_NE, weight_EE = gaussian(1000, num, seed=1), coupling(num, 0.3)
    found, least = errors(own, x_NE, weight_EE)
    assert bool((found > 0.999 * least - 1e-5).all())
    assert float(found.mean()) < bound * float(least.mean())
    apart = points(own, own.nearest(x_NE.T[:, None].contiguous())[:, 0].T) - x_NE
    assert float(found.mean()) < 0.99 * float(((apart @ weight_EE) * apart).sum(1).mean())


@pytest.mark.parametrize(("base", "bound"), [("e8", 1.04), ("integers", 1.09)])
def test_the_gap_of_the_search_in_a_triangular_lattice(base, bound):
    num, widths = (8, (1,) * 8) if base == "e8" else (5, (2,) * 5)
    G_EE = torch.linalg.cholesky(coupling(num, 0.3))
    own = lattice(base, "tanh", widths, 0.45 * G_EE)
    found, least = errors(own, gaussian(1000, num, seed=1) @ G_EE.T, None)
    assert bool((found > 0.999 * least - 1e-5).all())
    assert float(found.mean()) < bound * float(least.mean())


def test_a_stream_of_bits():
    codes = torch.tensor([[[3, 0], [1, 1]]]).int()
    packed = reference.pack_symbols(codes, (2, 1))
    assert packed.tolist() == [[0b101011]]
    assert torch.equal(reference.unpack_symbols(packed, (2, 1), 2), codes)


@pytest.mark.parametrize("widths", [(1,), (8, 8), (3, 3, 3), (2, 1), (8, 7, 1), (5, 4, 4)], ids=str)
def test_streams_of_any_widths(widths):
    for num_tiles in (1, 2, 7):
        limits = [1 << width for width in widths]
        columns = [torch.randint(n, (3, num_tiles), generator=generator(n)) for n in limits]
        codes = torch.stack(columns, -1).int()
        packed = reference.pack_symbols(codes, widths)
        bits = "".join(
            format(int(z), f"0{width}b")[::-1]
            for tile in codes[1].tolist()
            for z, width in zip(tile, widths)
        )
        assert "".join(format(b, "08b")[::-1] for b in packed[1].tolist()).startswith(bits)
        assert packed.shape == (3, math.ceil(num_tiles * sum(widths) / 8))
        assert torch.equal(reference.unpack_symbols(packed, widths, num_tiles), codes)


def test_symbols_that_do_not_fit_are_refused():
    for widths in ((2, 1), (1, 1)):
        with pytest.raises(ValueError, match=r"codes span 0\.\.2"):
            reference.pack_symbols(torch.tensor([[[0, 2]]]), widths)


def test_damaged_codes_are_refused():
    with pytest.raises(ValueError, match=r"expected uint8 \[..., 3\] for 3 tiles of 8 bits"):
        reference.unpack_symbols(torch.zeros(2, 4, dtype=torch.uint8), (4, 4), 3)
    with pytest.raises(ValueError, match=r"packed codes are torch\.int32"):
        reference.unpack_symbols(torch.zeros(2, 3, dtype=torch.int32), (4, 4), 3)


GOOD = {
    "widths": (2,) * 8,
    "group": 64,
    "lattice": "e8",
    "companding": "mu",
    "generator": "diagonal",
}


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"widths": ()}, r"widths \(\); allowed are 1..32 components of 1..8 bits"),
        ({"widths": (9,) * 8}, "allowed are 1..32 components"),
        ({"widths": (2,) * 9}, "e8 with 9 components; needed is a multiple of 8"),
        ({"group": 60}, "groups of 60 columns; needed is a multiple of the 8 components"),
        ({"lattice": "leech"}, "'leech'; allowed are integers, e8"),
        ({"companding": "log"}, "'log'; allowed are none, mu, tanh"),
        ({"generator": "full"}, "'full'; allowed are triangular, diagonal"),
    ],
)
def test_bad_formats_are_refused(field, message):
    LearnedLatticeSpec(**GOOD)
    with pytest.raises(ValueError, match=message):
        LearnedLatticeSpec(**{**GOOD, **field})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2.3}, "18.4 bits for a tile; allowed are multiples of 1/8 bit"),
        ({"dim": 4, "lattice": "e8"}, "e8 with dim 4; allowed are multiples of 8"),
        ({"group": 100}, "group 100 with dim 8; a group is a multiple of dim, or null"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        build(**options)


def test_bits_are_exact():
    codec = build(bits=2.5, dim=8, group=64)
    bits = codec.bits(100, 200)
    assert bits.codes == 100 * 8 * math.ceil(25 * 20 / 8)
    assert bits.codebook == 4 * 36 * 16
    assert bits.side == 4 * 2 * 32
    assert build(generator="diagonal", companding="none").bits(8, 128).codebook == 8 * 16


def test_the_lattice_is_chosen_by_the_dimension():
    chosen = [build(dim=dim).spec().to_dict()["lattice"] for dim in (1, 4, 8, 16)]
    assert chosen == ["integers", "integers", "e8", "e8"]
    assert build(lattice="integers").spec().to_dict()["lattice"] == "integers"


@pytest.mark.parametrize(
    "weights",
    [gaussian(64, 256), laplacian(64, 256), correlated(64, 256, 0.8)],
    ids=["gaussian", "laplacian", "correlated"],
)
@pytest.mark.parametrize("options", [{}, {"dim": 1, "bits": 3}], ids=str)
def test_learning_improves_on_the_start(weights, options):
    before, after = (mse(build(iterations=n, **options), weights) for n in (0, 25))
    assert after < before


def test_correlations_within_a_tile_are_made_use_of():
    weights = correlated(256, 128, 0.8)
    diagonal, triangular = (
        mse(build(generator=kind, iterations=15), weights) for kind in ("diagonal", "triangular")
    )
    assert triangular < 0.6 * diagonal


def test_companding_follows_heavy_tails():
    weights = laplacian(256, 128)
    none, mu = (
        mse(build(companding=kind, generator="diagonal", iterations=20), weights)
        for kind in ("none", "mu")
    )
    assert mu < 0.85 * none


def test_groups_have_lattices_of_their_own():
    weights = gaussian(64, 96) * torch.logspace(-3, 3, 3).repeat_interleave(32)
    codec = build(group=32, iterations=3)
    X_IJE = tiles.to_tiles(weights, codec.tile)
    state = codec.fit(X_IJE, None, generator())
    assert state["generator"].shape == (3, 36)
    error_IJE = (codec.decode(codec.encode(X_IJE, state), state) - X_IJE).square()
    power_IJE = X_IJE.square()
    for group in range(3):
        own = slice(4 * group, 4 * group + 4)
        assert float(error_IJE[:, own].mean() / power_IJE[:, own].mean()) < 0.11
    wrong = codec.decode(codec.encode(X_IJE[:, :4], state, col=4), state, col=4)
    assert float((wrong - X_IJE[:, :4]).square().mean()) > float(power_IJE[:, :4].mean())


def test_important_weights_are_represented_better():
    weights = torch.cat((gaussian(64, 64), 4 * gaussian(64, 64, seed=1)), 1)
    codec = build(iterations=10)
    X_IJE = tiles.to_tiles(weights, codec.tile)
    importance = torch.ones(1, 16, 1)
    importance[:, :8] = 100

    def error(weight_IJE):
        state = codec.fit(X_IJE, weight_IJE, generator())
        decoded = codec.decode(codec.encode(X_IJE, state), state)
        return (decoded - X_IJE)[:, :8].square().mean()

    assert float(error(importance)) < 0.5 * float(error(None))


def test_weights_without_importance_are_disregarded():
    weights = torch.cat((gaussian(64, 64), 1000 * gaussian(64, 64, seed=1)), 1)
    codec = build(iterations=5)
    X_IJE = tiles.to_tiles(weights, codec.tile)
    importance = torch.ones(1, 16, 1)
    importance[:, 8:] = 0
    state = codec.fit(X_IJE, importance, generator())
    decoded = codec.decode(codec.encode(X_IJE, state), state)
    assert float((decoded - X_IJE)[:, :8].square().mean()) < 0.11
    nothing = codec.fit(X_IJE, torch.zeros(1, 16, 1), generator())
    assert all(bool(t.isfinite().all()) for t in nothing.values())


@pytest.mark.parametrize("companding", COMPANDINGS)
@pytest.mark.parametrize(
    "weights",
    [
        torch.zeros(4, 40),
        torch.full((4, 40), 0.3),
        1e30 * gaussian(4, 40),
        1e-30 * gaussian(4, 40),
        torch.where(torch.rand(16, 40, generator=generator(1)) < 0.01, 1e4, gaussian(16, 40)),
    ],
    ids=["zeros", "constant", "large", "small", "outliers"],
)
def test_odd_weights(weights, companding):
    codec = build(companding=companding, iterations=4)
    X_IJE = tiles.to_tiles(weights, codec.tile)
    state = codec.fit(X_IJE, None, generator())
    assert all(bool(t.isfinite().all()) for t in state.values())
    decoded = codec.decode(codec.encode(X_IJE, state), state)
    assert bool(decoded.isfinite().all())
    power = float(X_IJE.double().square().mean())
    assert float((decoded - X_IJE).double().square().mean()) <= power + 1e-50


@pytest.mark.parametrize("options", [{}, {"dim": 1, "bits": 3}, {"generator": "diagonal"}], ids=str)
def test_same_bytes_with_any_number_of_threads(options):
    codec = build(iterations=3, group=None, **options)
    X_IJE = tiles.to_tiles(gaussian(256, 256), codec.tile)
    weight_1JE = gaussian(1, *X_IJE.shape[1:], seed=5).exp()
    threads = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            state = codec.fit(X_IJE, weight_1JE, generator())
            codes = codec.encode(X_IJE, state)
            results.append({**state, "codes": codes, "decoded": codec.decode(codes, state)})
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], t) for name, t in results[0].items())


def test_decoding_is_exact_in_any_order():
    """G q in float64 is the sum of exact products, whatever the sizes of its terms."""
    codes = torch.randint(256, (1, 50, 8), generator=generator(), dtype=torch.int32)
    G = torch.logspace(-7, 4, 8)[:, None] * gaussian(8, 8)
    entries = reference.stored_entries(G[None], "triangular").half()
    stored = reference.generator_matrices(entries.double(), 8)[0]
    q = reference.coordinates(codes, "e8", (8,) * 8).double()[0]
    sums = [
        (q[:, order] * stored[3, order]).cumsum(1)[:, -1]
        for order in itertools.islice(itertools.permutations(range(8)), 0, 40320, 997)
    ]
    assert all(torch.equal(total, sums[0]) for total in sums)


def test_learning_where_gradients_are_off():
    codec = build(iterations=2)
    X_IJE = tiles.to_tiles(gaussian(16, 64), codec.tile)
    state = codec.fit(X_IJE, None, generator())
    with torch.no_grad():
        again = codec.fit(X_IJE, None, generator())
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert not any(tensor.requires_grad for tensor in state.values())
