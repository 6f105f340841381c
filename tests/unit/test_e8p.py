"""The E8 codebooks and the exact search in them."""

import itertools

import pytest
import torch

from tests.support.params import slow_but
from vqllm.codecs import CODECS
from vqllm.codecs.search import e8p as e8p_nearest
from vqllm_kernels.e8p import reference

CPU = torch.device("cpu")
TABLE = reference.codeword_table(CPU)


def squared_distances(x, table):
    """float64 [N, K]; by the expansion of the square, whose rounding 1e-16 · |x|² is harmless."""
    x, table = x.double(), table.double()
    return (x**2).sum(1)[:, None] - 2 * x @ table.T + (table**2).sum(1)


def gaussian(num, scale=1.0, seed=0):
    return scale * torch.randn(num, 8, generator=torch.Generator().manual_seed(seed))


def test_absolute_vectors_are_the_ball_and_29_of_the_next_shell():
    table = reference.abs_table()
    assert table.shape == (256, 8)
    assert set(table.unique().tolist()) == {1, 3, 5}
    assert len(table.unique(dim=0)) == 256
    norms = (table.int() ** 2).sum(1) / 4
    ball = [v for v in itertools.product((1, 3, 5), repeat=8) if sum(c * c for c in v) <= 40]
    assert int((norms <= 10).sum()) == len(ball) == 227
    shell = table[norms == 12]
    assert len(shell) == 29
    assert (shell == 3).sum(1).unique().tolist() == [5]
    assert torch.equal(norms, norms.sort().values), "ordered by norm"


def test_every_codeword_is_a_distinct_point_of_the_shifted_lattice():
    assert len(TABLE.unique(dim=0)) == 65536
    doubled = (TABLE - 0.25) * 2
    assert torch.equal(doubled, doubled.round())
    integers = doubled.to(torch.int64)
    assert bool(((integers & 1).float().var(1) == 0).all()), "all integers or all half-integers"
    assert bool((integers.sum(1) % 4 == 0).all()), "even sum"


def test_the_bits_of_a_code():
    codes = torch.randint(1 << 16, (500,), generator=torch.Generator().manual_seed(3))
    table = reference.base_table()
    for code in codes.tolist():
        low = code & 0xFF
        parity = low.bit_count() % 2
        low ^= parity
        row = table[code >> 8].tolist()
        word = [
            (-1 if low >> i & 1 else 1) * row[i] / 2 + (-0.25 if parity else 0.25) for i in range(8)
        ]
        assert TABLE[code].tolist() == word


def test_one_bit_codebook():
    table = reference.e81b_codeword_table(CPU)
    assert len(table.unique(dim=0)) == 256
    assert torch.equal((table**2).sum(1).int().bincount(), torch.tensor([1, 0, 240, 0, 15]))
    assert bool(((2 * table).int().sum(1) % 4 == 0).all())
    assert table[1].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert table[2].tolist() == [-1, 1, 0, 0, 0, 0, 0, 0]
    assert table[113].tolist() == [0.5] * 8
    assert table[241].tolist() == [2] + 7 * [0]
    assert table[255].tolist() == 7 * [0] + [2]


@pytest.mark.parametrize("scale", slow_but([0.1, 1.0, 1e4], [0.1, 0.5, 1.0, 1.5, 3.0, 30.0, 1e4]))
@pytest.mark.parametrize("search", ["nearest", "search"])
def test_search_equals_brute_force(search, scale):
    x = gaussian(200, scale)
    codes = e8p_nearest.nearest(x) if search == "nearest" else e8p_nearest.search(x)[0]
    distances = squared_distances(x, TABLE)
    found = distances.gather(1, codes[:, None])[:, 0]
    torch.testing.assert_close(found, distances.min(1).values, rtol=1e-6, atol=1e-6)


def test_search_where_the_incomplete_shell_is_nearest():
    shell = [v for v in itertools.product((0.5, 1.5), repeat=8) if v.count(1.5) == 5]
    signs = torch.randint(2, (56, 8), generator=torch.Generator().manual_seed(1)) * 2 - 1
    x = torch.tensor(shell) * signs + gaussian(56, 0.1)
    codes = e8p_nearest.nearest(x)
    distances = squared_distances(x, TABLE)
    found = distances.gather(1, codes[:, None])[:, 0]
    torch.testing.assert_close(found, distances.min(1).values, rtol=1e-6, atol=1e-6)


def test_every_codeword_finds_itself():
    assert torch.equal(e8p_nearest.nearest(TABLE), torch.arange(1 << 16))


def test_ties_are_broken_the_same_way_in_any_batch():
    halves = gaussian(400).mul(2).round() / 2
    together = e8p_nearest.nearest(halves)
    distances = squared_distances(halves, TABLE)
    ties = (distances < distances.min(1, keepdim=True).values + 1e-9).sum(1)
    assert int((ties > 1).sum()) > 100, "the test holds many ties"
    found = distances.gather(1, together[:, None])[:, 0]
    assert torch.equal(found, distances.min(1).values)
    flipped = e8p_nearest.nearest(halves.flip(0)).flip(0)
    assert torch.equal(together, flipped)
    assert torch.equal(together, torch.cat([e8p_nearest.nearest(h) for h in halves.split(7)]))


def test_search_reports_its_distance():
    x = gaussian(300)
    codes, cost = e8p_nearest.search(x)
    torch.testing.assert_close(cost, ((x - TABLE[codes]) ** 2).sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_candidates_are_nearly_the_nearest_of_all(scale):
    num = 6
    x = gaussian(400, scale)
    codes = e8p_nearest.candidates(x, num)
    assert codes.shape == (400, num)
    assert torch.equal(codes[:, 0], e8p_nearest.nearest(x))
    distances = squared_distances(x, TABLE)
    found = distances.gather(1, codes)
    assert bool((found.diff(dim=1)[:, 1:][codes[:, 2:] != codes[:, :1]] > -1e-5).all())
    if scale == 1.0:
        ideal = distances.topk(num, largest=False).values
        assert float(found.mean() / ideal.mean()) < 1.05


@pytest.mark.parametrize("spike", [0.0, 3.0, 30.0])
def test_weighted_search_is_close_to_exact(spike):
    x = gaussian(300)
    factor, direction = gaussian(8, seed=1), gaussian(1, seed=2)[0]
    weight = factor.T @ factor / 8 + 0.2 * torch.eye(8) + spike * torch.outer(direction, direction)
    root = torch.linalg.cholesky(weight)
    ideal = squared_distances(x @ root, TABLE @ root).min(1).values

    def error(codes):
        gap = (x - TABLE[codes]).double()
        return (gap @ weight.double() * gap).sum(1)

    nearest = error(e8p_nearest.nearest(x))
    found = error(e8p_nearest.weighted_nearest(x, weight))
    assert bool((found >= ideal - 1e-5).all())
    assert bool((found <= nearest + 1e-5).all())
    assert float(found.mean()) < 1.05 * float(ideal.mean())
    assert float(nearest.mean()) > 1.2 * float(found.mean())


def test_weighted_search_without_weights_stays_with_the_nearest():
    x = gaussian(500)
    codes = e8p_nearest.weighted_nearest(x, 2 * torch.eye(8))
    assert torch.equal(codes, e8p_nearest.nearest(x))


def test_scale_is_proportional_to_the_weights_and_can_be_set():
    X = gaussian(64).reshape(8, 8, 8)
    generator = torch.Generator()
    codec = CODECS.get("e8p")()
    scale = codec.fit(X, None, generator)["scale"]
    rms = X.square().mean().sqrt()
    torch.testing.assert_close(scale, (rms / 1.037).reshape(1))
    torch.testing.assert_close(codec.fit(3 * X, None, generator)["scale"], 3 * scale)
    set_codec = CODECS.get("e8p").model_validate({"type": "e8p", "scale_factor": 0.9})
    torch.testing.assert_close(set_codec.fit(X, None, generator)["scale"], 0.9 * scale)


def test_scale_follows_the_importance():
    X = torch.cat((gaussian(64), 10 * gaussian(64))).reshape(2, 64, 8)
    weight = torch.tensor([1.0, 0.0]).reshape(2, 1, 1)
    codec, generator = CODECS.get("e8p")(), torch.Generator()
    torch.testing.assert_close(
        codec.fit(X, weight, generator)["scale"], codec.fit(X[:1], None, generator)["scale"]
    )


def test_zero_weights_decode_to_nearly_zero():
    X = torch.zeros(3, 2, 8)
    for name in ("e8p", "e81b"):
        codec = CODECS.get(name)()
        state = codec.fit(X, None, torch.Generator())
        assert float(codec.decode(codec.encode(X, state), state).abs().max()) < 1e-29
