"""Learned codebooks: the assignments, the means, the weights and the odd inputs."""

import itertools
import resource

import pytest
import torch

from tests.support.gaussian import gaussian, generator
from tests.support.params import slow
from vqllm.codecs import CODECS
from vqllm.codecs.base import nearest_entry
from vqllm.core import tiles
from vqllm.errors import NumericalError


def build(**options):
    return CODECS.get("kmeans").model_validate({"type": "kmeans", **options})


def reproduced(codec, X_IJE, state):
    return codec.decode(codec.encode(X_IJE, state), state)


@pytest.mark.parametrize(("num_elements", "num_entries"), [(1, 16), (2, 100), (4, 4096), (8, 256)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_nearest_entry_equals_brute_force(num_elements, num_entries, offset):
    x = gaussian(3000, num_elements, seed=1) + offset
    table = gaussian(num_entries, num_elements, seed=2) + offset
    distances = torch.cdist(x.double(), table.double(), compute_mode="donot_use_mm_for_euclid_dist")
    for num in (1, 5):
        index = nearest_entry(x, table, num)
        assert index.shape == (3000, num)
        ideal = distances.topk(num, largest=False).values
        torch.testing.assert_close(distances.gather(1, index), ideal, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tile", [(1, 4), (4, 1)], ids=str)
def test_each_entry_is_the_mean_of_its_tiles(tile):
    codec = build(tile_rows=tile[0], tile_cols=tile[1], index_bits=4, iterations=200)
    X = tiles.to_tiles(gaussian(64, 64), tile)
    state = codec.fit(X, None, generator())
    codes = codec.encode(X, state)[..., 0]
    for entry in range(16):
        mean = X[codes == entry].mean(0)
        torch.testing.assert_close(state["codebook"][entry].float(), mean, rtol=2e-3, atol=2e-3)


def test_more_passes_never_give_a_larger_error():
    X = tiles.to_tiles(gaussian(64, 256), (1, 2))
    errors = []
    for iterations in (1, 2, 4, 8, 16):
        codec = build(tile_cols=2, index_bits=5, iterations=iterations)
        state = codec.fit(X, None, generator())
        errors.append(float((reproduced(codec, X, state) - X).square().mean()))
    assert all(later <= earlier * 1.0001 for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


def test_weights_by_tile_move_the_error_to_where_it_matters_less():
    X = tiles.to_tiles(gaussian(64, 64), (1, 2))
    X[:, 16:] += 2
    weight_1J1 = torch.ones(1, 32, 1)
    weight_1J1[:, :16] = 100
    codec = build(tile_cols=2, index_bits=4)
    plain = codec.fit(X, None, generator())
    weighted = codec.fit(X, weight_1J1, generator())

    def error(state, columns):
        return float((reproduced(codec, X, state) - X)[:, columns].square().mean())

    important, rest = slice(0, 16), slice(16, 32)
    assert error(weighted, important) < 0.8 * error(plain, important)
    assert error(weighted, rest) > error(plain, rest)


def test_weights_by_element_of_a_tile():
    X = tiles.to_tiles(gaussian(64, 256), (1, 2))
    weight_11E = torch.tensor([9.0, 1.0]).reshape(1, 1, 2)
    codec = build(tile_cols=2, index_bits=5)
    plain, weighted = codec.fit(X, None, generator()), codec.fit(X, weight_11E, generator())

    def error(state, weight_E):
        codes = codec.encode(X, state, weight_E=weight_E)
        return float((weight_11E * (codec.decode(codes, state) - X) ** 2).mean())

    assert error(weighted, weight_11E[0, 0]) < 0.95 * error(plain, None)
    # Scaling the elements is the same problem: sqrt(weight) · x with equal weights.
    scaled = codec.fit(X * weight_11E.sqrt(), None, generator())
    codes = codec.encode(X * weight_11E.sqrt(), scaled)
    scaled_error = (codec.decode(codes, scaled) - X * weight_11E.sqrt()).square().mean()
    assert error(weighted, weight_11E[0, 0]) == pytest.approx(float(scaled_error), rel=0.03)


def test_equal_weights_are_no_weights():
    X = tiles.to_tiles(gaussian(32, 64), (1, 4))
    codec = build(tile_cols=4, index_bits=5, iterations=4)
    plain = codec.fit(X, None, generator())["codebook"]
    by_tile = codec.fit(X, torch.full((1, 1, 1), 4.0), generator())["codebook"]
    assert torch.equal(by_tile, plain)


def test_zero_weights_are_ignored():
    X = tiles.to_tiles(gaussian(64, 64), (1, 2))
    X[:, 16:] = 1000.0
    weight_1J1 = (torch.arange(32) < 16).float().reshape(1, 32, 1)
    codec = build(tile_cols=2, index_bits=4)
    state = codec.fit(X, weight_1J1, generator())
    only = codec.fit(X[:, :16], None, generator())
    got = (reproduced(codec, X, state) - X)[:, :16].square().mean()
    want = (reproduced(codec, X, only) - X)[:, :16].square().mean()
    assert float(got) == pytest.approx(float(want), rel=0.1)


@pytest.mark.parametrize("index_bits", [6, 13], ids=["k-means++", "random start"])
def test_fewer_distinct_tiles_than_entries_are_coded_without_loss(index_bits):
    values = gaussian(20, 2).half().float()
    X = values[torch.randint(20, (8, 50), generator=generator(3))]
    codec = build(tile_cols=2, index_bits=index_bits, iterations=40)
    state = codec.fit(X, None, generator())
    assert state["codebook"].shape == (1 << index_bits, 2)
    assert torch.equal(reproduced(codec, X, state), X)


def test_fewer_tiles_than_entries():
    X = gaussian(1, 3, 2).half().float()
    codec = build(tile_cols=2, index_bits=8)
    assert torch.equal(reproduced(codec, X, codec.fit(X, None, generator())), X)


def test_zero_matrix():
    X = torch.zeros(4, 8, 2)
    codec = build(tile_cols=2, index_bits=3)
    assert torch.equal(reproduced(codec, X, codec.fit(X, None, generator())), X)


def test_fit_on_a_sample_is_nearly_as_good():
    X = tiles.to_tiles(gaussian(128, 512), (1, 2))
    errors = []
    for sample in (1 << 17, 1 << 14):
        codec = build(tile_cols=2, index_bits=5, sample=sample)
        state = codec.fit(X, None, generator())
        errors.append(float((reproduced(codec, X, state) - X).square().mean()))
    assert errors[0] <= errors[1] < 1.05 * errors[0]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("tile_cols", "index_bits"), [(1, 4), (4, 8), slow(4, 13)])
def test_same_bytes_with_any_number_of_threads(tile_cols, index_bits, weighted):
    X = tiles.to_tiles(gaussian(256, 256), (1, tile_cols))
    weight = gaussian(1, X.shape[1], tile_cols, seed=5).exp() if weighted else None
    codec = build(tile_cols=tile_cols, index_bits=index_bits, iterations=3, sample=10000)
    threads = torch.get_num_threads()
    codebooks = []
    try:
        for num_threads in (1, 2, 3, 1):
            torch.set_num_threads(num_threads)
            codebooks.append(codec.fit(X, weight, generator())["codebook"])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(codebook, codebooks[0]) for codebook in codebooks)
    other = codec.fit(X, weight, generator(1))["codebook"]
    assert not torch.equal(other, codebooks[0]), "another sample"


def test_memory_does_not_grow_with_the_number_of_vectors():
    """With 65536 entries there are 32 vectors to a chunk of distances, 8 MB."""
    table = gaussian(1 << 16, 8)
    nearest_entry(gaussian(64, 8), table)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    nearest_entry(gaussian(1 << 12, 8, seed=1), table)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # of 1024 bytes


def test_many_entries_are_fitted_on_enough_tiles():
    assert build(index_bits=8).largest_sample == 1 << 17
    assert build(index_bits=16).largest_sample == 1 << 20
    assert build(index_bits=16, sample=1000).largest_sample == 1000


def test_weights_too_large_for_float16():
    X = tiles.to_tiles(1e6 * gaussian(16, 16), (1, 2))
    with pytest.raises(NumericalError, match="do not fit a float16 codebook"):
        build(tile_cols=2, index_bits=3).fit(X, None, generator())


def test_uniform_weights_too_large_for_float16():
    X = tiles.to_tiles(1e7 * gaussian(16, 16), (1, 1))
    uniform = CODECS.get("uniform").model_validate({"type": "uniform", "bits": 4, "group": None})
    with pytest.raises(NumericalError, match="more than float16 holds"):
        uniform.fit(X, None, generator())
