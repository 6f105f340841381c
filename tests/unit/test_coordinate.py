"""Coordinate descent as a rule: what it starts from, where it ends, that nothing gets worse."""

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit import test_rounding
from tests.unit.test_rounding import (
    TILES,
    Checkerboard,
    Refitting,
    hessian,
    loss_of,
    reproduce,
    rule,
    weights,
)
from vqllm.codecs import CODECS
from vqllm.core.protocols import Codec, State
from vqllm.core.tiles import from_tiles, grid, to_tiles
from vqllm.errors import RecipeError

KINDS = ["mixed", "smooth", "spiked", "thin"]
STARTS = ["nearest", "weights", "ldlq"]


def build(**values: Any) -> Codec:
    return CODECS.get(values["type"]).model_validate(values)


def fitted(values: dict[str, Any], W_RC: Tensor, H_CC: Tensor) -> tuple[Codec, State]:
    codec = build(**values)
    weight_IJE = to_tiles(torch.diagonal(H_CC).expand(W_RC.shape), codec.tile)
    generator = torch.Generator().manual_seed(0)
    return codec, codec.fit(to_tiles(W_RC, codec.tile), weight_IJE, generator)


def plain_first_pass(W_RC: Tensor, H_CC: Tensor, codec: Codec) -> Tensor:
    """From W itself: each tile column takes the code nearest to the minimum over it alone."""
    width = codec.tile[1]
    E_RC = torch.zeros_like(W_RC)
    codes = []
    for k in reversed(range(W_RC.shape[1] // width)):
        own = slice(k * width, (k + 1) * width)
        X_RT = W_RC[:, own] + E_RC @ H_CC[:, own] @ H_CC[own, own].inverse()
        codes.append(codec.encode(to_tiles(X_RT, codec.tile), {}, k))
        W_hat_RT = from_tiles(codec.decode(codes[-1], {}, k), codec.tile, len(W_RC), width)
        E_RC[:, own] = W_RC[:, own] - W_hat_RT
    return torch.cat(codes[::-1], 1)


class TestStarts:
    @pytest.mark.parametrize("tile", TILES)
    @pytest.mark.parametrize("start", STARTS)
    def test_identity_hessian_is_nearest(self, start: str, tile: tuple[int, int]) -> None:
        W = weights(37, 43)
        codec = Checkerboard(rows=tile[0], cols=tile[1])
        H = 7.5 * torch.eye(43, dtype=W.dtype)
        expected, _ = rule("nearest")(W, H, codec, {})
        for order in ("natural", "energy"):
            codes, _ = rule("coordinate", start=start, order=order)(W, H, codec, {})
            assert torch.equal(codes, expected)

    @pytest.mark.parametrize("tile", TILES)
    def test_first_pass_from_the_weights_is_the_plain_loop(self, tile: tuple[int, int]) -> None:
        W, H = weights(12, 144), hessian("mixed", 144)
        codec = Checkerboard(rows=tile[0], cols=tile[1])
        codes, _ = rule("coordinate", start="weights", passes=1)(W, H, codec, {})
        assert torch.equal(codes, plain_first_pass(W, H, codec))

    def test_from_ldlq_it_is_ldlq_with_passes(self) -> None:
        W, H = weights(16, 64), hessian("mixed", 64)
        codec = Checkerboard(cols=4)
        for passes in (1, 3):
            options = {"passes": passes, "tolerance": 0}
            codes, _ = rule("coordinate", start="ldlq", **options)(W, H, codec, {})
            assert torch.equal(codes, rule("ldlq", passes=passes)(W, H, codec, {})[0])

    @pytest.mark.parametrize("order", ["hessian", "energy"])
    @pytest.mark.parametrize("start", STARTS)
    def test_order_is_that_of_permuted_columns(self, start: str, order: str) -> None:
        W, H = weights(16, 40), hessian("mixed", 40)
        scale = torch.exp(torch.linspace(2, -2, 40, dtype=W.dtype))
        H = scale[:, None] * H * scale
        W = W * torch.exp(3 * torch.linspace(-1, 1, 40, dtype=W.dtype))
        codec = Checkerboard(step=0.1)
        codes, _ = rule("coordinate", start=start, order=order)(W, H, codec, {})
        energy = torch.diagonal(H) * W.square().sum(0)
        by = torch.argsort(torch.diagonal(H) if order == "hessian" else energy)
        permuted, _ = rule("coordinate", start=start)(W[:, by], H[by][:, by], codec, {})
        assert torch.equal(codes[:, by], permuted)


def _losses(codes: Tensor, codec: Codec, state: State, W_RC: Tensor, H_CC: Tensor) -> Tensor:
    """tr(E H Eᵀ) of each row of tiles, [I]."""
    E_RC = W_RC - reproduce(codes, codec, state, W_RC)
    return to_tiles((E_RC @ H_CC) * E_RC, (codec.tile[0], W_RC.shape[1])).sum((1, 2))


class TestOrderings:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("tile", TILES)
    def test_it_ends_below_its_start_and_no_pass_raises_the_loss(
        self, tile: tuple[int, int], kind: str
    ) -> None:
        W, H = weights(25, 64), hessian(kind, 64)
        codec = Checkerboard(rows=tile[0], cols=tile[1], step=1.0)
        for start in STARTS:
            losses = [
                loss_of(rule("coordinate", start=start, passes=n, tolerance=0), W, H, codec, {})
                for n in range(1, 5)
            ]
            assert all(after <= before * (1 + 1e-12) for before, after in pairwise(losses))
            if start == "nearest":
                assert losses[0] < loss_of(rule(start), W, H, codec, {})
            elif kind != "smooth":  # where only neighbours are coupled, feedback leaves little
                if start == "ldlq":
                    losses.insert(0, loss_of(rule("ldlq"), W, H, codec, {}))
                assert losses[1] < losses[0]

    @pytest.mark.parametrize("name", test_rounding.CODECS_BY_NAME)
    def test_every_codec_gets_better_from_pass_to_pass(self, name: str) -> None:
        W, H = weights(37, 43).float(), hessian("mixed", 43).float()
        codec, state = fitted(test_rounding.CODECS_BY_NAME[name], W, H)
        for options in ({}, {"state": "solved", "start": "ldlq"}):
            start = loss_of(rule(options.get("start", "nearest")), W, H, codec, state)
            losses = [
                loss_of(rule("coordinate", passes=n, **options), W, H, codec, state) for n in (1, 3)
            ]
            assert losses[0] < start
            assert losses[1] <= losses[0] * (1 + 1e-5)

    def test_solved_scales_are_better_than_fixed_ones(self) -> None:
        W, H = weights(32, 64).float(), hessian("mixed", 64).float()
        codec, state = fitted({"type": "uniform", "bits": 3, "group": None}, W, H)
        for start in STARTS:
            fixed = loss_of(rule("coordinate", start=start), W, H, codec, state)
            solved = loss_of(rule("coordinate", start=start, state="solved"), W, H, codec, state)
            assert solved < fixed
        codes, moved = rule("coordinate", state="solved")(W, H, codec, state)
        assert not torch.equal(moved["scale"], state["scale"])
        _, unpacked = codec.unpack(codec.pack(codes, moved), *W.shape)
        assert torch.equal(unpacked["scale"], moved["scale"])


class TestEnds:
    @pytest.mark.parametrize("start", STARTS)
    def test_a_fixed_point_is_reached(self, start: str) -> None:
        W, H = weights(25, 64), hessian("mixed", 64)
        codec = Checkerboard(rows=2, cols=4, step=0.5)
        rounding = rule("coordinate", start=start, passes=60, tolerance=0)
        codes, state = rounding(W, H, codec, {})
        again, _ = rounding.refine(W, H, codec, codes, state)
        assert torch.equal(again, codes)
        fewer, _ = rule("coordinate", start=start, passes=30, tolerance=0)(W, H, codec, {})
        assert torch.equal(fewer, codes), "it did not take all of the passes"

    @pytest.mark.parametrize(
        "values",
        [
            {"type": "uniform", "bits": 2, "group": None},
            {"type": "kmeans", "tile_cols": 2, "index_bits": 2},
            {"type": "kmeans", "tile_cols": 1, "tile_rows": 2, "index_bits": 2},
        ],
        ids=lambda values: values["type"],
    )
    def test_on_tiny_problems_no_single_code_is_better(self, values: dict[str, Any]) -> None:
        """2 x 4 weights, 4 codes a tile: all codings of a row of tiles can be tried."""
        for seed in range(6):
            W, H = weights(2, 4, seed).float(), hessian("mixed", 4, seed).float()
            codec, state = fitted(values, W, H)
            num_rows, num_cols = grid(2, 4, codec.tile)
            codings = torch.tensor(list(product(range(4), repeat=num_cols)), dtype=torch.int32)
            of_each = torch.stack(
                [_losses(c.expand(num_rows, -1)[..., None], codec, state, W, H) for c in codings]
            )
            best_I = of_each.min(0).values
            for start in STARTS:
                rounding = rule("coordinate", start=start, passes=50, tolerance=0)
                codes, _ = rounding(W, H, codec, state)
                found_I = _losses(codes, codec, state, W, H)
                assert bool((found_I >= best_I * (1 - 1e-5)).all())
                for i in range(num_rows):
                    near = (codings != codes[i, :, 0]).sum(1) <= 1
                    assert float(of_each[near, i].min()) >= float(found_I[i]) * (1 - 1e-4)

    def test_passes_end_when_they_gain_little(self) -> None:
        W, H = weights(25, 64), hessian("mixed", 64)
        codec = Checkerboard(cols=4, step=0.5)

        def num_passes(tolerance: float) -> int:
            Checkerboard.seen.clear()
            rule("coordinate", passes=40, tolerance=tolerance)(W, H, codec, {})
            return (len(Checkerboard.seen) - 1) // 16  # all at once, then 16 tile columns a pass

        counts = [num_passes(tolerance) for tolerance in (0.9, 0.05, 0.002, 0.0)]
        assert counts == sorted(counts)
        assert counts[0] == 1
        assert 1 < counts[1] < counts[3] < 40


class TestRefits:
    def test_a_codec_that_is_fitted_in_the_loop(self) -> None:
        W, H = weights(16, 64), hessian("mixed", 64)
        codec = Refitting(cols=2)
        for start in STARTS:
            codec.given.clear()
            _, state = rule("coordinate", start=start)(W, H, codec, {"kept": W})
            assert len(codec.given) == (4 if start == "ldlq" else 0)
            assert len(state) == 1 + len(codec.given)

    def test_ldlq_in_another_order_is_refused(self) -> None:
        rule("coordinate", order="energy").check(Refitting())
        rule("coordinate", start="ldlq").check(Refitting())
        with pytest.raises(RecipeError, match=r"start ldlq in order energy .* every 16 columns"):
            rule("coordinate", start="ldlq", order="energy").check(Refitting())


SPARSE = {"type": "sparse", "share": 0.05, "base": {"type": "uniform", "bits": 3, "group": None}}
SPARSE_BASES: dict[str, dict[str, Any]] = {
    "uniform": SPARSE["base"],
    "kmeans-1x4": {"type": "kmeans", "tile_cols": 4, "index_bits": 5},
    "kmeans-3x1": {"type": "kmeans", "tile_rows": 3, "tile_cols": 1, "index_bits": 5},
    "e8p": {"type": "e8p"},
    "trellis": {"type": "trellis", "state_bits": 6},
}


def heavy(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Gaussian weights and, in every row, three that are 8 to 10 times as large."""
    generator = torch.Generator().manual_seed(seed)
    W_RC = torch.randn(rows, cols, generator=generator)
    places_RN = torch.rand(rows, cols, generator=generator).argsort(dim=1)[:, :3]
    return W_RC.scatter(1, places_RN, 8 + 2 * torch.rand(rows, 3, generator=generator))


class TestOutliers:
    @pytest.mark.parametrize("base", SPARSE_BASES)
    @pytest.mark.parametrize("order", ["natural", "energy"])
    def test_no_row_of_tiles_gets_worse(self, base: str, order: str) -> None:
        W, H = heavy(37, 43), hessian("mixed", 43).float()
        codec, state = fitted({**SPARSE, "base": SPARSE_BASES[base]}, W, H)
        start = rule("ldlq", order="natural" if order == "natural" else "hessian")
        results = [start(W, H, codec, state)]
        for n in (1, 2, 4):
            rounding = rule("coordinate", passes=n, tolerance=0, order=order)
            results.append(rounding.refine(W, H, codec, *results[0]))
        losses = [_losses(codes, codec, s, W, H) for codes, s in results]
        assert all(bool((b <= a * (1 + 1e-4)).all()) for a, b in pairwise(losses))
        assert float(losses[-1].sum()) < 0.98 * float(losses[0].sum())
        num = codec.num_outliers(results[0][0].shape[1])
        for _, s in results:
            assert s["outlier_columns"].shape[1] == s["outlier_values"].shape[1] == num
            assert bool((s["outlier_columns"].diff(dim=1) > 0).all()), "ascending, none twice"

    def test_outliers_move_to_where_they_are_needed(self) -> None:
        W, H = heavy(24, 64), hessian("mixed", 64).float()
        codec, state = fitted(SPARSE, W, H)
        assert codec.num_outliers(64) == 3
        planted = W.abs() > 6
        base = codec.base_state(state)
        wrong = torch.zeros(24, 64).scatter(1, torch.arange(3).expand(24, 3), 1e-3)
        elsewhere = codec.with_outliers(to_tiles(wrong, codec.tile), base)
        rounding = rule("coordinate", start="ldlq", tolerance=0)
        for given in (state, elsewhere):
            _, found = rounding(W, H, codec, given)
            kept = from_tiles(codec.outliers(found, 64), codec.tile, 24, 64) != 0
            assert float((kept & planted).sum()) >= 0.9 * float(planted.sum())
        ldlq = loss_of(rule("ldlq"), W, H, codec, elsewhere)
        assert loss_of(rounding, W, H, codec, elsewhere) < 0.1 * ldlq

    def test_values_are_the_least_squares_solution(self) -> None:
        W, H = heavy(12, 40), hessian("mixed", 40).float()
        codec, state = fitted(SPARSE, W, H)
        codes, state = rule("coordinate", start="ldlq")(W, H, codec, state)
        rest = W - from_tiles(codec.base.decode(codes, codec.base_state(state)), (1, 1), 12, 40)
        M = torch.linalg.cholesky(H.double())
        for row in range(12):
            columns = state["outlier_columns"][row].long()
            best = torch.linalg.lstsq(M[columns].T, M.T @ rest[row].double()[:, None]).solution
            torch.testing.assert_close(
                state["outlier_values"][row].double(), best[:, 0], rtol=2e-3, atol=2e-3
            )

    @pytest.mark.parametrize("name", ["nearest", "ldlq", "beam"])
    def test_every_rule_codes_what_the_outliers_leave(self, name: str) -> None:
        W, H = heavy(21, 48), hessian("mixed", 48).float()
        options = {} if name == "nearest" else {"order": "hessian", "passes": 1}
        codec, state = fitted({**SPARSE, "base": SPARSE_BASES["kmeans-1x4"]}, W, H)
        rule(name, **options).check(codec)
        codes, same = rule(name, **options)(W, H, codec, state)
        S = from_tiles(codec.outliers(state, codes.shape[1]), codec.tile, 21, 48)
        alone, _ = rule(name, **options)(W - S, H, codec.base, codec.base_state(state))
        assert torch.equal(codes, alone)
        assert all(torch.equal(same[key], value) for key, value in state.items())

    def test_codebooks_fitted_in_the_loop_are_fitted_to_the_rest(self) -> None:
        W, H = heavy(16, 48), hessian("mixed", 48).float()
        base = {"type": "grouped_kmeans", "index_bits": 3, "group_rows": 8, "group_cols": 16}
        codec, state = fitted({**SPARSE, "base": base}, W, H)
        codes, found = rule("ldlq")(W, H, codec, state)
        S = from_tiles(codec.outliers(state, codes.shape[1]), codec.tile, 16, 48)
        alone, alone_state = rule("ldlq")(W - S, H, codec.base, codec.base_state(state))
        assert torch.equal(codes, alone)
        assert torch.equal(found["base_codebook"], alone_state["codebook"])

    def test_beam_names_the_base_that_lists_no_codes(self) -> None:
        with pytest.raises(RecipeError, match="codec uniform finds one code"):
            rule("beam").check(build(**SPARSE))
