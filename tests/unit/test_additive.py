"""Additive codebooks: the search against brute force, the least squares, the gain of both."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.gaussian import gaussian, generator
from vqllm.codecs import CODECS
from vqllm.codecs.additive import Additive, _least, _least_squares, _search
from vqllm.core import tiles
from vqllm.core.protocols import State
from vqllm.errors import NumericalError, RecipeError


def build(**options: Any) -> Additive:
    return Additive.model_validate({"type": "additive", **options})


def tables_of(num: int, entries: int, size: int) -> list[Tensor]:
    return [0.6**m * gaussian(entries, size, seed=m + 1) for m in range(num)]


def all_sums(tables: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Every sum [S, E], and its codes [S, M]."""
    codes = torch.tensor(list(itertools.product(*(range(len(table)) for table in tables))))
    return torch.stack([table[c] for table, c in zip(tables, codes.T)]).sum(0), codes


def error(X: Tensor, X_hat: Tensor) -> float:
    return float((X - X_hat).double().square().mean())


def fitted_error(X: Tensor, **options: Any) -> float:
    codec = CODECS.get(options["type"]).model_validate(options)
    state = codec.fit(X, None, generator(1))
    return error(X, codec.decode(codec.encode(X, state), state))


class TestSearch:
    @pytest.mark.parametrize("offset", [0.0, 50.0])
    @pytest.mark.parametrize("num", [1, 5])
    @pytest.mark.parametrize(("num_tables", "entries", "beam"), [(2, 8, 8), (3, 4, 16)])
    def test_a_beam_of_all_sums_is_brute_force(
        self, num_tables: int, entries: int, beam: int, num: int, offset: float
    ) -> None:
        x, tables = gaussian(300, 4), tables_of(num_tables, entries, 4)
        sums, codes = all_sums(tables)
        distance = torch.cdist(x.double(), sums.double()).square()
        ideal = distance.topk(num, largest=False)
        moved = [tables[0] + offset, *tables[1:]]
        found = _search(x + offset, moved, beam, num)
        assert found.shape == (300, num, num_tables)
        place = (found[:, :, None] == codes).all(-1).int().argmax(-1)
        torch.testing.assert_close(distance.gather(1, place), ideal.values, rtol=0, atol=1e-4)

    def test_weights_of_each_vector(self) -> None:
        x, tables = gaussian(300, 4), tables_of(2, 8, 4)
        weight = gaussian(300, 4, seed=9).exp()
        sums, codes = all_sums(tables)
        distance = (weight[:, None] * (x[:, None] - sums) ** 2).sum(2)
        found = _search(x, tables, 8, 1, weight)[:, 0]
        assert torch.equal(found, codes[distance.argmin(1)])
        plain = _search(x, tables, 8, 1)
        assert torch.equal(_search(x, tables, 8, 1, weight[:, :1]), plain)

    def test_a_matrix_of_weights(self) -> None:
        codec = build(tile_cols=4, index_bits=3, beam=8)
        X = gaussian(20, 10, 4)
        state = codec.fit(X, None, generator())
        factor = gaussian(4, 4, seed=3)
        weight = factor @ factor.T + 0.1 * torch.eye(4)
        sums, codes = all_sums([state[f"s{m}_codebook"].float() for m in range(2)])
        gap = X.flatten(0, 1)[:, None] - sums
        best = ((gap @ weight) * gap).sum(2).argmin(1)
        found = codec.encode(X, state, weight_E=weight).flatten(0, 1)
        assert float((found == codes[best]).all(1).float().mean()) > 0.99  # the rest are ties

    def test_one_vector_codes_like_many(self) -> None:
        x, tables = gaussian(5000, 8), tables_of(3, 256, 8)
        many = _search(x, tables, 4, 2)
        for n in (0, 17, 4999):
            assert torch.equal(_search(x[n : n + 1], tables, 4, 2), many[n : n + 1])

    def test_a_wider_beam_is_better(self) -> None:
        X = gaussian(1, 4000, 8)
        state = build(beam=2, iterations=3, rounds=1).fit(X, None, generator())
        errors = []
        for beam in (1, 2, 4, 16):
            codec = build(beam=beam)
            errors.append(error(X, codec.decode(codec.encode(X, state), state)))
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.93 * errors[0]

    @pytest.mark.parametrize("num", [1, 2, 8])
    @pytest.mark.parametrize("shape", [(1, 2), (1, 256), (2, 12), (8, 256), (3, 32)])
    def test_least_is_topk(self, shape: tuple[int, int], num: int) -> None:
        score = gaussian(50, *shape)
        row, col = _least(score, num)
        expected = score.flatten(1).topk(min(num, shape[0] * shape[1]), largest=False).indices
        assert torch.equal(row * shape[1] + col, expected)


class TestLeastSquares:
    @pytest.mark.parametrize("weights", ["none", "tile", "element"])
    def test_sweeps_reach_the_solution_of_the_normal_equations(self, weights: str) -> None:
        x, tables = gaussian(4000, 4), tables_of(3, 16, 4)
        codes = _search(x, tables, 4, 1)[:, 0]
        weight = None
        if weights != "none":
            weight = gaussian(4000, 1 if weights == "tile" else 4, seed=8).exp()
        full = torch.ones(4000, 4) if weight is None else weight.expand(4000, 4)
        one_hot = torch.nn.functional.one_hot(codes, 16).flatten(1).double()
        columns = [
            torch.linalg.lstsq(root[:, None] * one_hot, (root * x_N)[:, None], driver="gelsd")
            for x_N, root in zip(x.double().T, full.double().sqrt().T)
        ]
        solution = torch.cat([column.solution for column in columns], 1)

        def loss(entries: Tensor) -> float:
            return float((full * (x - one_hot @ entries.double()) ** 2).sum())

        got = loss(torch.cat(_least_squares(x, weight, tables, codes)))
        assert got < 0.9 * loss(torch.cat(tables))
        assert got < (1 + 1e-4) * loss(solution)

    def test_no_round_raises_the_error(self) -> None:
        X = gaussian(1, 4000, 4)
        codec = build(tile_cols=4, index_bits=5, iterations=4)
        x, _ = codec._drawn(X, None, generator())
        tables, codes = codec._start(x, None, generator())

        def now() -> float:
            return error(x, sum((t[c] for t, c in zip(tables, codes.T)), torch.zeros(4)))

        errors = [now()]
        for _ in range(6):
            tables = _least_squares(x, None, tables, codes)
            errors.append(now())
            codes = codec._improved(x, None, tables, codes)
            errors.append(now())
        assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
        assert errors[-1] < 0.9 * errors[0]

    def test_entries_without_tiles_stay(self) -> None:
        x, tables = gaussian(100, 4), tables_of(2, 8, 4)
        codes = torch.randint(4, (100, 2), generator=generator())
        for new, old in zip(_least_squares(x, None, tables, codes), tables):
            assert torch.equal(new[4:], old[4:])


class TestFit:
    @pytest.mark.parametrize(("codebooks", "gain"), [(2, 0.97), (3, 0.95)])
    def test_better_than_codebooks_learned_one_after_another(
        self, codebooks: int, gain: float
    ) -> None:
        X = tiles.to_tiles(gaussian(32, 512), (1, 4))
        sizes = {"tile_cols": 4, "index_bits": 5, "iterations": 10}
        additive = fitted_error(X, type="additive", codebooks=codebooks, beam=8, **sizes)
        stages = [{"type": "kmeans", **sizes}] * codebooks
        assert additive < gain * fitted_error(X, type="residual", stages=stages, beam=8)

    def test_weights_by_element(self) -> None:
        X = tiles.to_tiles(gaussian(64, 256), (1, 4))
        weight_11E = torch.tensor([9.0, 1.0, 1.0, 1.0]).reshape(1, 1, 4)
        codec = build(tile_cols=4, index_bits=4, beam=8)
        weighted = codec.fit(X, weight_11E, generator())
        plain = codec.fit(X, None, generator())

        def loss(state: State, weight_E: Tensor | None) -> float:
            codes = codec.encode(X, state, weight_E=weight_E)
            return float((weight_11E * (codec.decode(codes, state) - X) ** 2).mean())

        weight_E = weight_11E[0, 0]
        assert loss(weighted, weight_E) < 0.98 * loss(plain, weight_E) < loss(plain, None)

    def test_fit_on_a_sample_is_nearly_as_good(self) -> None:
        X = tiles.to_tiles(gaussian(64, 512), (1, 4))
        sizes = {"type": "additive", "tile_cols": 4, "index_bits": 4}
        whole, part = fitted_error(X, **sizes), fitted_error(X, sample=1 << 11, **sizes)
        assert whole <= part < 1.05 * whole

    @pytest.mark.parametrize("value", [0.0, 3.0])
    def test_constant_matrix_is_coded_without_loss(self, value: float) -> None:
        assert fitted_error(torch.full((4, 8, 4), value), type="additive", tile_cols=4) < 1e-12

    def test_fewer_tiles_than_entries(self) -> None:
        X = gaussian(1, 3, 2).half().float()
        assert fitted_error(X, type="additive", tile_cols=2, index_bits=4) < 1e-6

    def test_weights_too_large_for_float16(self) -> None:
        with pytest.raises(NumericalError, match=r"codec additive: .*do not fit a float16"):
            build(tile_cols=2, index_bits=2).fit(1e6 * gaussian(16, 16, 2), None, generator())

    def test_bits_are_those_of_two_codebooks(self) -> None:
        bits = build().bits(512, 1024)
        assert bits.codes == 2 * 512 * 1024
        assert bits.codebook == 2 * 256 * 8 * 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebooks": 1}, "codebooks"),
        ({"codebooks": 17}, "codebooks"),
        ({"index_bits": 17}, "index_bits"),
        ({"beam": 0}, "beam"),
        ({"rounds": -1}, "rounds"),
        ({"init": "kmeans++", "index_bits": 13}, "init kmeans"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, RecipeError), match=message):
        build(**options)
