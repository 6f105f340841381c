"""Rounding rules: equalities with plain loops and GPTQ, orderings, and the loss theory predicts."""

from itertools import pairwise, product
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.unstored import Unstored
from vqllm.codecs import CODECS
from vqllm.core import linalg, metrics
from vqllm.core.protocols import Codec, Rounding, State
from vqllm.core.tiles import from_tiles, to_tiles
from vqllm.errors import NumericalError, RecipeError
from vqllm.rounding import ROUNDINGS
from vqllm.rounding.columns import PADDING, TileColumns
from vqllm.rounding.coordinate import descend
from vqllm.rounding.ldlq import feedback

TILES = [(1, 1), (1, 2), (1, 4), (1, 8), (4, 1), (2, 4), (3, 8)]


class Checkerboard(Unstored):
    """The lattice D_E: multiples of `step` whose integers add up to an even number in every tile.

    A codec without a fixed number of bits, in any dtype, for tiles of any shape: small enough to
    be seen to be right. Its symbols are the integers themselves.
    """

    type: Literal["checkerboard"] = "checkerboard"
    rows: int = 1
    cols: int = 1
    step: float = 0.25

    seen: ClassVar[list[tuple[int, Tensor | None]]] = []

    @property
    def tile(self) -> tuple[int, int]:
        return self.rows, self.cols

    def fit(self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator) -> State:
        return {}

    def encode(
        self, X_IJE: Tensor, state: State, col: int = 0, weight_E: Tensor | None = None
    ) -> Tensor:
        self.seen.append((col, weight_E))
        x = X_IJE / self.step
        codes = x.round()
        gap = x - codes
        worst = torch.nn.functional.one_hot(gap.abs().argmax(-1), x.shape[-1])
        toward = torch.where(gap >= 0, 1, -1) * worst
        odd = codes.sum(-1, keepdim=True) % 2
        return (codes + odd * toward).to(torch.int32)

    def decode(self, codes_IJM: Tensor, state: State, col: int = 0) -> Tensor:
        return codes_IJM * self.step


class Weighing(Checkerboard):
    """The same, saying that it weighs errors."""

    weighted: ClassVar[bool] = True


def rule(name: str, **options: Any) -> Rounding:
    return ROUNDINGS.get(name).model_validate({"type": name, **options})


def reproduce(codes_IJM: Tensor, codec: Codec, state: State, W_RC: Tensor) -> Tensor:
    X_IJE = codec.decode(codes_IJM, state).to(W_RC)
    return from_tiles(X_IJE, codec.tile, *W_RC.shape)


def loss_of(rounding: Rounding, W_RC: Tensor, H_CC: Tensor, codec: Codec, state: State) -> float:
    codes_IJM, state = rounding(W_RC, H_CC, codec, state)
    return metrics.proxy_loss(W_RC, reproduce(codes_IJM, codec, state, W_RC), H_CC)


def weights(rows: int, cols: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator, dtype=torch.float64)


def hessian(kind: str, num_features: int, seed: int = 0) -> Tensor:
    """Damped E[x xᵀ], float64, of activations that are

    mixed    correlated by a random matrix
    smooth   an autoregression over the features, neighbours correlated by 0.95
    spiked   nearly white but for one token in 200 that is 300 times as large, as attention-sink
             tokens are
    thin     fewer tokens than features
    """
    generator = torch.Generator().manual_seed(seed)
    num_tokens = num_features // 2 if kind == "thin" else 4 * num_features
    x_NC = torch.randn(num_tokens, num_features, generator=generator, dtype=torch.float64)
    if kind in ("mixed", "thin"):
        x_NC = x_NC @ torch.randn(
            num_features, num_features, generator=generator, dtype=torch.float64
        )
    elif kind == "smooth":
        for j in range(1, num_features):
            x_NC[:, j] = 0.95 * x_NC[:, j - 1] + (1 - 0.95**2) ** 0.5 * x_NC[:, j]
    else:
        sink = torch.randn(num_features, generator=generator, dtype=torch.float64)
        x_NC[::200] += 300 * sink
    return linalg.damp(x_NC.T @ x_NC / num_tokens, 0.01)


def plain_ldlq(W_RC: Tensor, H_CC: Tensor, codec: Codec) -> Tensor:
    """The definition: one product with all of L for every tile column, no stripes."""
    width = codec.tile[1]
    L, _ = linalg.block_ldl(H_CC, width)
    W_hat = torch.zeros_like(W_RC)
    codes = []
    for k in reversed(range(W_RC.shape[1] // width)):
        own = slice(k * width, (k + 1) * width)
        after = slice(own.stop, None)
        X = W_RC[:, own] + (W_RC[:, after] - W_hat[:, after]) @ L[after, own]
        codes.append(codec.encode(to_tiles(X, codec.tile), {}, k))
        W_hat[:, own] = from_tiles(codec.decode(codes[-1], {}, k), codec.tile, len(X), width)
    return torch.cat(codes[::-1], 1)


def gptq(W_RC: Tensor, H_CC: Tensor, codec: Codec) -> Tensor:
    """GPTQ on the reversed columns, solving with the whole diagonal block.

    Source: Frantar et al., arXiv 2210.17323, algorithm 1, with blocks in place of columns.
    """
    width = codec.tile[1]
    U = torch.linalg.cholesky(H_CC.flip(0, 1).inverse(), upper=True)
    rest = W_RC.flip(1).clone()
    codes = []
    for start in range(0, W_RC.shape[1], width):
        own, after = slice(start, start + width), slice(start + width, None)
        X = rest[:, own]
        k = (W_RC.shape[1] - start) // width - 1
        codes.append(codec.encode(to_tiles(X.flip(1), codec.tile), {}, k))
        Q = from_tiles(codec.decode(codes[-1], {}, k), codec.tile, len(X), width).flip(1)
        error = torch.linalg.solve_triangular(U[own, own], X - Q, upper=True, left=False)
        rest[:, after] -= error @ U[own, after]
    return torch.cat(codes[::-1], 1)


class TestEqualities:
    @pytest.mark.parametrize("kind", ["mixed", "smooth", "spiked"])
    @pytest.mark.parametrize("tile", TILES)
    def test_ldlq_is_gptq(self, tile: tuple[int, int], kind: str) -> None:
        W, H = weights(24, 64), hessian(kind, 64)
        codec = Checkerboard(rows=tile[0], cols=tile[1])
        codes, _ = rule("ldlq")(W, H, codec, {})
        assert torch.equal(codes, gptq(W, H, codec))

    @pytest.mark.parametrize("stripe", [1, 8, 24, 128, 1000])
    @pytest.mark.parametrize("tile", TILES)
    def test_stripes_are_the_plain_loop(self, tile: tuple[int, int], stripe: int) -> None:
        W, H = weights(12, 144), hessian("mixed", 144)
        codec = Checkerboard(rows=tile[0], cols=tile[1])
        columns = TileColumns.of(W, H, codec, {})
        E = feedback(columns, stripe)
        codes = columns.codes_IJM
        assert torch.equal(codes, plain_ldlq(W, H, codec))
        torch.testing.assert_close(W - E, reproduce(codes, codec, {}, W), atol=1e-13, rtol=0)

    @pytest.mark.parametrize("tile", TILES)
    def test_identity_hessian_is_nearest(self, tile: tuple[int, int]) -> None:
        W = weights(37, 43)
        codec = Checkerboard(rows=tile[0], cols=tile[1])
        for H in (torch.eye(43, dtype=W.dtype), 7.5 * torch.eye(43, dtype=W.dtype)):
            expected, _ = rule("nearest")(W, H, codec, {})
            for options in ({}, {"passes": 2}, {"order": "hessian"}):
                codes, _ = rule("ldlq", **options)(W, H, codec, {})
                assert torch.equal(codes, expected)

    def test_unit_of_the_hessian_does_not_matter(self) -> None:
        W, H = weights(16, 40), hessian("mixed", 40)
        codec = Checkerboard(cols=4)
        codes, _ = rule("ldlq", passes=1)(W, H, codec, {})
        assert torch.equal(codes, rule("ldlq", passes=1)(W, 1024 * H, codec, {})[0])

    def test_order_is_that_of_permuted_columns(self) -> None:
        W, H = weights(16, 40), hessian("mixed", 40)
        scale = torch.exp(torch.linspace(2, -2, 40, dtype=W.dtype))
        H = scale[:, None] * H * scale
        codec = Checkerboard(cols=1)
        codes, _ = rule("ldlq", order="hessian")(W, H, codec, {})
        order = torch.argsort(torch.diagonal(H))
        permuted, _ = rule("ldlq")(W[:, order], H[order][:, order], codec, {})
        assert torch.equal(codes[:, order], permuted)

    def test_repeats_and_leaves_its_input_alone(self) -> None:
        W, H = weights(20, 43).float(), hessian("spiked", 43).float()
        before = W.clone(), H.clone()
        codec = Checkerboard(cols=8)
        for options in ({"passes": 1}, {"order": "hessian"}):
            first, _ = rule("ldlq", **options)(W, H, codec, {})
            second, _ = rule("ldlq", **options)(W, H, codec, {})
            assert torch.equal(first, second)
        assert torch.equal(W, before[0])
        assert torch.equal(H, before[1])


class TestTheory:
    @pytest.mark.parametrize("kind", ["mixed", "smooth", "spiked", "thin"])
    def test_loss_is_the_cell_times_the_trace_of_D(self, kind: str) -> None:
        """Uniform cells of width 2·step: tr(E H Eᵀ) = R · (2 step)²/12 · tr D, for nearest tr H."""
        W, H = 100 * weights(2000, 48), hessian(kind, 48)
        codec = Checkerboard(step=0.5)
        cell = len(W) * (2 * codec.step) ** 2 / 12
        energy = float(torch.trace(W @ H @ W.T))
        _, D = linalg.block_ldl(H, 1)
        assert loss_of(rule("ldlq"), W, H, codec, {}) * energy == pytest.approx(
            cell * float(D.sum()), rel=0.06
        )
        assert loss_of(rule("nearest"), W, H, codec, {}) * energy == pytest.approx(
            cell * float(torch.trace(H)), rel=0.06
        )


class TestExample:
    def test_the_numbers_of_the_ldlq_docstring(self) -> None:
        W = torch.tensor([[0.4, 0.4, 0.4]], dtype=torch.float64)
        H = torch.tensor([[4, 2, 2], [2, 3, 2], [2, 2, 3]], dtype=torch.float64)
        integers = Checkerboard(step=0.5)  # even multiples of the step, for tiles of one weight
        L, D = linalg.block_ldl(H, 1)
        torch.testing.assert_close(L, torch.tensor([[1, 0, 0], [0.5, 1, 0], [0.5, 0.5, 1]]).to(W))
        torch.testing.assert_close(D.flatten(), torch.tensor([4, 2, 1.5]).to(W))
        errors = {"nearest": [[0.4, 0.4, 0.4]], "ldlq": [[0.4, -0.6, 0.4]]}
        gaps = {"nearest": [[0.8, 0.6, 0.4]], "ldlq": [[0.3, -0.4, 0.4]]}
        losses = {"nearest": 3.52, "ldlq": 0.92}
        for name, loss in losses.items():
            codes, _ = rule(name)(W, H, integers, {})
            E = W - reproduce(codes, integers, {}, W)
            torch.testing.assert_close(E, torch.tensor(errors[name]).double())
            torch.testing.assert_close(E @ L, torch.tensor(gaps[name]).double())
            assert float(torch.trace(E @ H @ E.T)) == pytest.approx(loss)
            assert float(((E @ L) ** 2 * D.flatten()).sum()) == pytest.approx(loss)


class TestOrderings:
    @pytest.mark.parametrize("kind", ["mixed", "smooth", "spiked", "thin"])
    @pytest.mark.parametrize("tile", TILES)
    def test_ldlq_beats_nearest(self, tile: tuple[int, int], kind: str) -> None:
        codec = Checkerboard(rows=tile[0], cols=tile[1], step=1.0)
        for seed in range(5):
            W, H = weights(48, 64, seed), hessian(kind, 64, seed)
            ldlq = loss_of(rule("ldlq"), W, H, codec, {})
            assert ldlq < loss_of(rule("nearest"), W, H, codec, {})

    @pytest.mark.parametrize("kind", ["mixed", "smooth", "spiked", "thin"])
    @pytest.mark.parametrize("tile", TILES)
    def test_no_pass_raises_the_loss(self, tile: tuple[int, int], kind: str) -> None:
        W, H = weights(25, 64), hessian(kind, 64)
        codec = Checkerboard(rows=tile[0], cols=tile[1], step=1.0)
        losses = [loss_of(rule("ldlq", passes=passes), W, H, codec, {}) for passes in range(4)]
        for before, after in pairwise(losses):
            assert after <= before * (1 + 1e-12)
        if kind != "smooth":  # where only neighbours are coupled, LDLQ leaves little to improve
            assert losses[1] < losses[0]

    def test_order_by_hessian_helps_where_the_diagonal_is_uneven(self) -> None:
        W = weights(128, 64)
        scale = torch.exp(torch.linspace(3, -3, 64, dtype=W.dtype))
        H = scale[:, None] * hessian("mixed", 64) * scale
        codec = Checkerboard(step=0.7)
        sorted_loss = loss_of(rule("ldlq", order="hessian"), W, H, codec, {})
        assert sorted_loss < 0.5 * loss_of(rule("ldlq"), W, H, codec, {})

    @pytest.mark.parametrize("stripe", [1, 16, 1000])
    def test_pass_agrees_with_the_errors_it_keeps(self, stripe: int) -> None:
        W, H = weights(20, 64), hessian("mixed", 64)
        codec = Checkerboard(rows=3, cols=4, step=0.5)
        columns = TileColumns.of(W, H, codec, {})
        E = feedback(columns, 128)
        for _ in range(3):
            descend(columns, E, stripe)
        W_hat = reproduce(columns.codes_IJM, codec, {}, W)
        torch.testing.assert_close(W - E, W_hat, atol=1e-12, rtol=0)
        reference = rule("ldlq", passes=3)(W, H, codec, {})[0]
        assert torch.equal(columns.codes_IJM, reference)

    def test_scalar_passes_end_where_no_single_change_helps(self) -> None:
        W, H = weights(6, 12), hessian("mixed", 12)
        codec = Checkerboard(step=0.5)
        codes, _ = rule("ldlq", passes=30)(W, H, codec, {})
        best = metrics.proxy_loss(W, reproduce(codes, codec, {}, W), H)
        for row, col, change in product(range(6), range(12), (-2, 2)):
            other = codes.clone()
            other[row, col] += change
            assert metrics.proxy_loss(W, reproduce(other, codec, {}, W), H) >= best


class TestShapes:
    @pytest.mark.parametrize("tile", [*TILES, (16, 16), (64, 64)])
    @pytest.mark.parametrize("name", ["nearest", "ldlq"])
    def test_odd_sizes_are_padded(self, name: str, tile: tuple[int, int]) -> None:
        W, H = weights(37, 43), hessian("mixed", 43)
        codec = Checkerboard(rows=tile[0], cols=tile[1])
        codes, _ = rule(name)(W, H, codec, {})
        assert codes.dtype == torch.int32
        assert codes.shape == (-(-37 // tile[0]), -(-43 // tile[1]), tile[0] * tile[1])
        error = (W - reproduce(codes, codec, {}, W)).square().mean()
        assert error < 20 * codec.step**2

    def test_padding_leaves_the_other_columns_alone(self) -> None:
        """Tiles that the padding does not touch are coded as without it."""
        W, H = weights(16, 40), hessian("mixed", 40)
        columns = TileColumns.of(W[:, :37], H[:37, :37], Checkerboard(cols=8), {})
        assert columns.W_RC.shape == (16, 40)
        assert bool((columns.W_RC[:, 37:] == 0).all())
        L, D = linalg.block_ldl(columns.H_CC, 8)
        assert bool((L[37:, :37] == 0).all())
        pad = PADDING * torch.diagonal(H[:37, :37]).mean()
        torch.testing.assert_close(torch.diagonal(D[-1])[5:], pad.expand(3))

    def test_weights_and_grid_columns_reach_the_codec(self) -> None:
        W, H = weights(4, 24), hessian("mixed", 24)
        _, D = linalg.block_ldl(H, 4)
        Checkerboard.seen.clear()
        rule("ldlq")(W, H, Weighing(rows=2, cols=4), {})
        assert [col for col, _ in Checkerboard.seen] == [5, 4, 3, 2, 1, 0]
        for col, weight_EE in Checkerboard.seen:
            assert weight_EE is not None
            torch.testing.assert_close(weight_EE, torch.block_diag(D[col], D[col]))
        Checkerboard.seen.clear()
        rule("ldlq")(W, H, Checkerboard(rows=2, cols=4), {})
        assert all(weight_E is None for _, weight_E in Checkerboard.seen)

    def test_singular_hessian_is_named(self) -> None:
        with pytest.raises(NumericalError, match="not positive definite"):
            rule("ldlq")(weights(4, 8), torch.zeros(8, 8).double(), Checkerboard(), {})

    @pytest.mark.parametrize("options", [{"passes": -1}, {"order": "diag"}, {"pass": 1}])
    def test_options_that_make_no_sense_are_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            rule("ldlq", **options)


class Refitting(Checkerboard):
    """The same, fitted anew to every `group` columns: it notes to what, and changes nothing."""

    group: int = 16

    given: ClassVar[list[tuple[int, Tensor, Tensor | None]]] = []

    @property
    def refit_cols(self) -> int | None:
        return self.group

    def refit(self, X_IJE: Tensor, weight_IJE: Tensor | None, state: State, col: int) -> State:
        self.given.append((col, X_IJE, weight_IJE))
        return {**state, f"fitted{col}": X_IJE.mean()}


class TestRefit:
    @pytest.mark.parametrize("group", [16, 48, 64, 1000])
    @pytest.mark.parametrize("tile", [(1, 1), (1, 4), (4, 1), (2, 8)])
    def test_a_group_is_fitted_to_what_is_then_coded(
        self, tile: tuple[int, int], group: int
    ) -> None:
        """X = W + (W − Ŵ) L, with the columns right of the group coded, weighed by D."""
        W, H = weights(12, 144), hessian("mixed", 144)
        codec = Refitting(rows=tile[0], cols=tile[1], group=group)
        L, D = linalg.block_ldl(H, tile[1])
        for stripe in (1, 24, 1000):
            codec.given.clear()
            columns = TileColumns.of(W, H, codec, {})
            E = feedback(columns, stripe)
            assert torch.equal(columns.codes_IJM, plain_ldlq(W, H, codec))
            starts = list(reversed(range(0, 144, group)))
            assert [col * tile[1] for col, _, _ in codec.given] == starts
            assert set(columns.state) == {f"fitted{start // tile[1]}" for start in starts}
            for start, (_, X_IJE, weight_IJE) in zip(starts, codec.given):
                own, after = slice(start, start + group), slice(start + group, None)
                X = W[:, own] + E[:, after] @ L[after, own]
                torch.testing.assert_close(X_IJE, to_tiles(X, tile))
                diagonal = torch.diagonal(D, dim1=1, dim2=2).flatten()[own]
                assert weight_IJE is not None
                torch.testing.assert_close(
                    weight_IJE.expand_as(X_IJE), to_tiles(diagonal.expand(12, -1), tile)
                )

    def test_coded_order_by_hessian_is_refused(self) -> None:
        rule("ldlq").check(Refitting())
        rule("ldlq", order="hessian").check(Checkerboard())
        with pytest.raises(RecipeError, match=r"order hessian .* every 16 columns"):
            rule("ldlq", order="hessian").check(Refitting())

    def test_the_state_returned_is_the_one_that_was_fitted(self) -> None:
        W, H = weights(37, 43).float(), hessian("mixed", 43).float()
        values = {"type": "grouped_kmeans", "index_bits": 4, "group_rows": 8, "group_cols": 12}
        codec = CODECS.get("grouped_kmeans").model_validate(values)
        fitted = codec.fit(to_tiles(W, codec.tile), None, torch.Generator().manual_seed(0))
        codes, state = rule("ldlq", passes=1)(W, H, codec, fitted)
        assert not torch.equal(state["codebook"], fitted["codebook"])
        decoded = codec.spec().decode(codec.pack(codes, state), *W.shape)
        assert torch.equal(decoded, reproduce(codes, codec, state, W))


class TestRefine:
    @pytest.mark.parametrize("options", [{}, {"order": "hessian"}, {"passes": 3}])
    @pytest.mark.parametrize("tile", [(1, 1), (1, 4), (3, 2)])
    def test_given_codes_do_not_get_worse(
        self, tile: tuple[int, int], options: dict[str, Any]
    ) -> None:
        W, H = weights(21, 64), hessian("mixed", 64)
        codec = Checkerboard(rows=tile[0], cols=tile[1], step=1.0)
        codes, _ = rule("nearest")(W, H, codec, {})
        before = metrics.proxy_loss(W, reproduce(codes, codec, {}, W), H)
        refined, state = rule("ldlq", **options).refine(W, H, codec, codes, {})
        assert state == {}
        after = metrics.proxy_loss(W, reproduce(refined, codec, {}, W), H)
        assert after < before
        again, _ = rule("ldlq", **options).refine(W, H, codec, refined, {})
        assert metrics.proxy_loss(W, reproduce(again, codec, {}, W), H) <= after

    def test_a_state_that_was_fitted_in_the_loop_stays(self) -> None:
        W, H = weights(16, 64), hessian("mixed", 64)
        codec = Refitting(cols=2)
        codes, _ = rule("ldlq")(W, H, codec, {})
        codec.given.clear()
        _, state = rule("ldlq").refine(W, H, codec, codes, {"kept": W})
        assert set(state) == {"kept"}
        assert not codec.given


CODECS_BY_NAME: dict[str, dict[str, Any]] = {
    "uniform-row": {"type": "uniform", "bits": 3, "group": None},
    "uniform-16": {"type": "uniform", "bits": 2, "group": 16},
    "kmeans-1x4": {"type": "kmeans", "tile_rows": 1, "tile_cols": 4, "index_bits": 7},
    "kmeans-4x1": {"type": "kmeans", "tile_rows": 4, "tile_cols": 1, "index_bits": 7},
    "grouped-1x2": {"type": "grouped", "tile_cols": 2, "index_bits": 4, "rounds": 1},
    "grouped-kmeans": {
        "type": "grouped_kmeans",
        "index_bits": 4,
        "group_rows": 16,
        "group_cols": 12,
        "fit": "once",
    },
    "split": {
        "type": "split",
        "share": 0.1,
        "first": {"type": "kmeans", "tile_rows": 2, "tile_cols": 1, "index_bits": 6},
        "rest": {"type": "kmeans", "tile_rows": 3, "tile_cols": 1, "index_bits": 6},
    },
    "additive": {"type": "additive", "tile_cols": 4, "index_bits": 5, "iterations": 5},
    "e8p": {"type": "e8p"},
    "e81b": {"type": "e81b"},
    "e8p+e81b": {"type": "residual", "stages": [{"type": "e8p"}, {"type": "e81b"}], "beam": 2},
}

# A codec that is not named above is here with its first point, a quick one if it has one.
CODECS_BY_NAME |= {
    name: {"type": name, **point.options}
    for name in CODECS
    if name not in {values["type"] for values in CODECS_BY_NAME.values()}
    for point in sorted(CODECS.get(name).points, key=lambda point: not point.quick)[:1]
}


class TestWithEveryCodec:
    def test_all_are_here(self) -> None:
        assert {values["type"] for values in CODECS_BY_NAME.values()} == set(CODECS)

    @pytest.mark.parametrize("name", CODECS_BY_NAME)
    def test_nearest_then_ldlq_then_passes(self, name: str) -> None:
        values = CODECS_BY_NAME[name]
        codec = CODECS.get(values["type"]).model_validate(values)
        for kind, seed in (("mixed", 0), ("spiked", 1), ("smooth", 2)):
            W, H = weights(37, 43, seed).float(), hessian(kind, 43, seed).float()
            weight_IJE = to_tiles(torch.diagonal(H).expand(W.shape), codec.tile)
            generator = torch.Generator().manual_seed(seed)
            state = codec.fit(to_tiles(W, codec.tile), weight_IJE, generator)
            nearest = loss_of(rule("nearest"), W, H, codec, state)
            losses = [loss_of(rule("ldlq", passes=n), W, H, codec, state) for n in range(3)]
            assert losses[0] < nearest
            assert losses[1] <= losses[0] * (1 + 1e-5)
            assert losses[2] <= losses[1] * (1 + 1e-5)

    @pytest.mark.parametrize("name", CODECS_BY_NAME)
    def test_codes_survive_packing(self, name: str) -> None:
        values = CODECS_BY_NAME[name]
        codec = CODECS.get(values["type"]).model_validate(values)
        W, H = weights(37, 43).float(), hessian("mixed", 43).float()
        state = codec.fit(to_tiles(W, codec.tile), None, torch.Generator().manual_seed(0))
        codes, state = rule("ldlq", order="hessian")(W, H, codec, state)
        decoded = codec.spec().decode(codec.pack(codes, state), *W.shape)
        assert torch.equal(decoded, reproduce(codes, codec, state, W))
