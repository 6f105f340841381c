"""The trellis: its bits, its values, and how good the search for a path is."""

import itertools
import sys

import numpy as np
import pytest
import torch

from vqllm.codecs import CODECS
from vqllm.codecs.search import compiled, viterbi, viterbi_int16
from vqllm.errors import RecipeError
from vqllm_kernels import compilers, formats
from vqllm_kernels.trellis import reference
from vqllm_kernels.trellis.spec import TrellisSpec

CPU = torch.device("cpu")


def trellis(**options):
    return CODECS.get("trellis").model_validate({"type": "trellis", **options})


def shifts(tile_bits, num_steps):
    ends = reference.step_ends(tile_bits, num_steps)
    return [b - a for a, b in zip([0, *ends], ends)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_float32(monkeypatch):
    """From now on."""
    monkeypatch.setattr(viterbi_int16, "fits", lambda *_: False)
    viterbi._compiled.cache_clear()


def distortion(codec, num_tiles=256):
    X_IJE = random(1, num_tiles, 256)
    state = codec.fit(X_IJE, None, torch.Generator())
    return float((codec.decode(codec.encode(X_IJE, state), state) - X_IJE).square().mean())


def ring(bits, shift_T, state_bits):
    """The states of a ring of bits, by the words of the definition."""
    ends = list(itertools.accumulate(shift_T))
    states = []
    for end in ends:
        window = [bits[i % len(bits)] for i in range(end - state_bits, end)]
        states.append(int("".join(map(str, window)), 2))
    return states


def closed_paths(shift_T, state_bits):
    """All of them, int64 [2^bits, T]."""
    rings = itertools.product((0, 1), repeat=sum(shift_T))
    return torch.tensor([ring(bits, shift_T, state_bits) for bits in rings])


@pytest.mark.parametrize(("bits", "state_bits", "steps"), [(256, 16, 256), (592, 9, 256)])
@pytest.mark.parametrize("seed", range(3))
def test_states_are_windows_of_a_ring_of_bits(bits, state_bits, steps, seed):
    words = torch.randint(
        0, 1 << 16, (1, bits // 16), generator=torch.Generator().manual_seed(seed)
    )
    text = "".join(f"{int(word):016b}" for word in words[0])
    expected = ring([int(b) for b in text], shifts(bits, steps), state_bits)
    assert reference.states(words.int(), bits, state_bits, steps)[0].tolist() == expected


@pytest.mark.parametrize("rate", [1, 1.5, 2, 2.0625, 2.5, 3, 3.75, 4, 5, 7.5, 8])
def test_words_are_the_inverse_of_states(rate):
    bits = round(rate * 256)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 1 << 16, (20, bits // 16), generator=generator, dtype=torch.int32)
    states = reference.states(words, bits, 12, 256)
    assert torch.equal(reference.words(states, bits), words)


def test_rates_are_spread_evenly():
    assert shifts(256 * 5 // 2, 256)[:4] == [2, 3, 2, 3]
    assert sum(shifts(592, 256)) == 592
    assert set(shifts(592, 256)) == {2, 3}


def test_computed_values():
    """Against the published formulas, one state after another in Python's own integers."""
    s = 12345
    x = (34038481 * s + 76625530) % 2**32
    one_mad = sum(x.to_bytes(4, "little"))
    y = ((89226354 * s + 64248484) % 2**32 & 0x8FFF8FFF) ^ 0x3B603B60
    halves = torch.tensor([y & 0xFFFF, y >> 16], dtype=torch.int32).to(torch.int16)
    three_inst = float(halves.view(torch.float16).sum())
    # Mean 510 and deviation 147.8 are QTIP's; 1.24371 is exllamav3's scale of 3INST.
    assert float(reference.computed_values("1mad", 16, CPU)[s]) == pytest.approx(
        (one_mad - 510) / 147.800537109375, abs=2e-3
    )
    assert float(reference.computed_values("3inst", 16, CPU)[s]) == pytest.approx(
        three_inst / 1.24371088, abs=2e-3
    )


@pytest.mark.parametrize("code", ["1mad", "mul1", "3inst", "mul2"])
@pytest.mark.parametrize("state_bits", [4, 8, 16])
def test_values_have_zero_mean_and_unit_variance(code, state_bits):
    values_SV = reference.computed_values(code, state_bits, CPU).double()
    assert torch.allclose(values_SV.mean(0), torch.zeros(1).double(), atol=1e-6)
    assert torch.allclose(values_SV.square().mean(0), torch.ones(1).double(), atol=1e-6)


@pytest.mark.parametrize("num_weights", [1, 2])
@pytest.mark.parametrize("shift_T", [[1] * 10, [2, 1, 2, 1, 2], [3, 2, 3], [2, 2, 2, 2]])
def test_search_with_given_context_is_exact(shift_T, num_weights):
    state_bits = 4
    values_SV = random(1 << state_bits, num_weights)
    x_NTV = random(12, len(shift_T), num_weights, seed=1)
    paths = closed_paths(shift_T, state_bits)
    error_NP = (values_SV[paths] - x_NTV[:, None]).square().sum((2, 3))
    for context in range(1 << (state_bits - shift_T[0])):
        closed = (paths[:, 0] >> shift_T[0]) == context
        best_N = error_NP[:, closed].min(1).values
        found = viterbi.search(x_NTV, values_SV, shift_T, torch.full((12,), context))
        error_N = (values_SV[found] - x_NTV).square().sum((1, 2))
        torch.testing.assert_close(error_N, best_N)
        assert bool(((found[:, 0] >> shift_T[0]) == context).all())


@pytest.mark.parametrize(
    ("shift_T", "gap"), [([1] * 14, 0.05), ([2] * 7, 0.02), ([2, 3] * 3, 0.02)]
)
def test_what_guessing_the_context_costs(shift_T, gap):
    """Against the best of all closed paths. Rings as short as these are the worst case."""
    values_SV = random(16, 1)
    x_NTV = random(300, len(shift_T), 1, seed=1)
    paths = closed_paths(shift_T, 4)
    best = (values_SV[paths] - x_NTV[:, None]).square().sum((2, 3)).min(1).values.mean()
    found = viterbi.tail_biting(x_NTV, values_SV, shift_T).long()
    error = (values_SV[found] - x_NTV).square().sum((1, 2)).mean()
    assert float(best) <= float(error) * (1 + 1e-6)
    assert float(error) <= (1 + gap) * float(best)


@pytest.mark.parametrize("num_weights", [1, 2])
@pytest.mark.parametrize("rate", [1, 2, 2.5, 3, 4])
def test_compiled_search_is_as_good_as_the_one_in_torch(rate, num_weights, monkeypatch):
    steps = 256 // num_weights
    shift_T = shifts(round(rate * 256), steps)
    values_SV = random(1 << 10, num_weights)
    x_NTV = random(6, steps, num_weights, seed=1)
    with_numba = viterbi.tail_biting(x_NTV, values_SV, shift_T).long()
    monkeypatch.setattr(viterbi, "has_numba", lambda: False)
    plain = viterbi.tail_biting(x_NTV, values_SV, shift_T).long()
    errors = [(values_SV[path] - x_NTV).square().sum((1, 2)) for path in (with_numba, plain)]
    # Costs are summed in another order, so that ties may fall otherwise.
    torch.testing.assert_close(errors[0].mean(), errors[1].mean(), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("code", "state_bits", "rate"),
    [
        ("bytes2", 10, 1.75),
        ("mul1", 8, 2),
        ("mul1", 10, 1.5),
        ("bytes4", 10, 3.5),
        ("bytes4", 10, 4),
    ],
)
def test_costs_of_16_bits_lose_nothing(code, state_bits, rate, monkeypatch):
    codec = trellis(code=code, state_bits=state_bits, bits=rate)
    errors = [distortion(codec, 96)]
    in_float32(monkeypatch)
    errors.append(distortion(codec, 96))
    assert errors[0] != errors[1]  # two searches
    assert errors[0] == pytest.approx(errors[1], rel=2e-3)


def test_the_unit_of_the_values_does_not_matter():
    values_SV, x_NTV = random(1 << 9, 1).clamp(-2.5, 2.5), random(20, 64, 1, seed=1)
    found = [viterbi.tail_biting(x_NTV * f, values_SV * f, [2] * 64) for f in (1, 64, 2**-9)]
    assert torch.equal(found[0], found[1])
    # Most tiles have weights beyond all values.
    search = viterbi_int16.Int16Search(values_SV.numpy(), np.array([2] * 64), 16)
    assert not search.paths(x_NTV.numpy(), np.empty((20, 64), np.int32)).any()


@pytest.mark.parametrize("size", [6.0, 1e4, 1e30])
def test_weights_beyond_16_bits_are_searched_in_float32(size, monkeypatch):
    values_SV = random(1 << 8, 1)
    x_NTV = random(4, 32, 1, seed=1)
    x_NTV[1, 5], x_NTV[3, 31] = size, -size
    found = viterbi.tail_biting(x_NTV, values_SV, [2] * 32)
    in_float32(monkeypatch)
    exact = viterbi.tail_biting(x_NTV, values_SV, [2] * 32)
    assert torch.equal(found[[1, 3]], exact[[1, 3]])
    assert bool((found[:, 0] >> 2 == found[:, -1] & 63).all())


def test_values_that_were_written_to_are_read_again():
    values_SV, x_NTV = random(1 << 9, 1), random(4, 64, 1, seed=1)
    first = viterbi.tail_biting(x_NTV, values_SV, [2] * 64)
    values_SV.neg_()
    second = viterbi.tail_biting(x_NTV, values_SV, [2] * 64)
    assert torch.equal(second, viterbi.tail_biting(x_NTV, values_SV.clone(), [2] * 64))
    assert not torch.equal(first, second)


def test_threads_change_nothing():
    values_SV, x_NTV = random(1 << 9, 1), random(7, 64, 1, seed=1)
    own = torch.get_num_threads()
    found = []
    try:
        for num_threads in (1, 2, 3, 11):
            torch.set_num_threads(num_threads)
            found.append(viterbi.tail_biting(x_NTV, values_SV, [2] * 64))
    finally:
        torch.set_num_threads(own)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 100.0])
def test_rings_close_whatever_the_weights(factor):
    """Weights far from all values, and values far apart: costs reach the end of 16 bits."""
    values_SV = random(1 << 9, 1) * factor
    x_NTV = torch.where(random(20, 64, 1, seed=1) > 0, 5.0, -5.0)
    for shift in (1, 2, 4):
        found = viterbi.tail_biting(x_NTV, values_SV, [shift] * 64)
        assert bool((found[:, 0] >> shift == found[:, -1] & (511 >> shift)).all())


def test_without_numba_it_is_said_once(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "numba", None)
    for cached in (compilers.why_no_numba, compiled.has_numba):
        cached.cache_clear()
    try:
        codec = trellis(state_bits=6)
        X_IJE = random(2, 1, 256)
        state = codec.fit(X_IJE, None, torch.Generator())
        codec.encode(X_IJE, state)
        codec.encode(X_IJE, state)
    finally:
        for cached in (compilers.why_no_numba, compiled.has_numba):
            cached.cache_clear()
    assert ["numba cannot be imported" in r.message for r in caplog.records] == [True]


@pytest.mark.parametrize(("code", "worse"), [("table", "mul1"), ("hybrid", "mul2")])
def test_training_a_table_pays(code, worse):
    own, other = (trellis(code=name, state_bits=8) for name in (code, worse))
    assert distortion(own) < 0.96 * distortion(other)


def test_more_states_are_better():
    errors = [distortion(trellis(state_bits=state_bits)) for state_bits in (6, 8, 10, 12)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2.03}, "2.03 bits; allowed are multiples of 0.0625 from 1 to 8"),
        ({"tile_rows": 24}, "tiles of 24 rows; allowed are the divisors of 256"),
        ({"tile_rows": 0}, "tiles of 0 rows"),
        (
            {"code": "mul2", "bits": 5},
            "5 bits; allowed are multiples of 0.0625 from 1 to 4 with code",
        ),
        ({"code": "mul1", "step_weights": 2}, "2 weights a step; allowed: "),
        ({"code": "mul1", "table_bits": 9}, "only hybrid and gf2 have a table"),
        (
            {"bits": 8, "state_bits": 8},
            "8 bits; allowed are multiples of 0.0625 from 1 to 7 with code",
        ),
    ],
)
def test_options_that_no_format_has_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        trellis(**options)


@pytest.mark.parametrize(
    "options", [{"state_bits": 3}, {"state_bits": 17}, {"bits": 0.5}, {"code": "x"}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        trellis(**options)


def test_a_specification_that_means_nothing_is_refused():
    good = TrellisSpec(tile_rows=16, code="mul1", tile_bits=512, state_bits=12, step_weights=1)
    for change in ({"state_bits": 20}, {"code": "mul9"}, {"tile_bits": 500}, {"table_bits": 4}):
        with pytest.raises(ValueError, match=r"trellis-v1: .*(allowed|which has none)"):
            formats.from_dict({**good.to_dict(), **change})
