"""Beam search over rows: LDLQ as its narrowest case, the optimum as its widest, and no losses."""

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from vqllm import recipes
from vqllm.codecs import CODECS
from vqllm.core import linalg, metrics
from vqllm.core.protocols import Codec, Rounding, State
from vqllm.core.tiles import from_tiles, to_tiles
from vqllm.errors import RecipeError
from vqllm.rounding import ROUNDINGS, coordinate
from vqllm.rounding.beam import descend, feedback
from vqllm.rounding.columns import TileColumns

KMEANS = {"type": "kmeans", "index_bits": 4, "iterations": 4}
CODECS_WITH_LISTS: dict[str, dict[str, Any]] = {
    "kmeans-1x1": {**KMEANS, "tile_cols": 1, "index_bits": 2},
    "kmeans-1x4": {**KMEANS, "tile_cols": 4},
    "kmeans-3x1": {**KMEANS, "tile_rows": 3, "tile_cols": 1},
    "kmeans-2x2": {**KMEANS, "tile_rows": 2, "tile_cols": 2},
    "additive": {"type": "additive", "tile_cols": 4, "index_bits": 4, "beam": 4, "rounds": 2},
    "residual": {"type": "residual", "stages": [{**KMEANS, "tile_cols": 4}] * 2, "beam": 4},
    "e8p": {"type": "e8p"},
}
each_codec = pytest.mark.parametrize("name", CODECS_WITH_LISTS)


def rule(name: str, **options: Any) -> Rounding:
    return ROUNDINGS.get(name).model_validate({"type": name, **options})


def weights(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def hessian(num_features: int, seed: int = 0, decay: float = 1.0) -> Tensor:
    """Damped, in a random basis, with eigenvalues that fall like k^-decay."""
    basis = torch.linalg.qr(weights(num_features, num_features, seed + 100).double()).Q
    eigenvalues = torch.arange(1, num_features + 1).double() ** -decay
    return linalg.damp(basis * eigenvalues @ basis.T, 0.01).float()


def fitted(name: str, W_RC: Tensor) -> tuple[Codec, State]:
    values = CODECS_WITH_LISTS[name]
    codec = CODECS.get(values["type"]).model_validate(values)
    return codec, codec.fit(to_tiles(W_RC, codec.tile), None, torch.Generator().manual_seed(1))


def reproduced(codes_IJM: Tensor, codec: Codec, state: State, W_RC: Tensor) -> Tensor:
    return from_tiles(codec.decode(codes_IJM, state), codec.tile, *W_RC.shape)


def loss(codes_IJM: Tensor, W_RC: Tensor, H_CC: Tensor, codec: Codec, state: State) -> float:
    return metrics.proxy_loss(W_RC, reproduced(codes_IJM, codec, state, W_RC), H_CC)


class TestEqualities:
    @each_codec
    def test_a_beam_of_one_is_ldlq_with_descent(self, name: str) -> None:
        W, H = weights(37, 43), hessian(43)
        codec, state = fitted(name, W)
        for options in ({"passes": 0}, {"passes": 2}, {"passes": 1, "order": "hessian"}):
            expected, _ = rule("ldlq", **options)(W, H, codec, state)
            codes, _ = rule("beam", beam=1, **options)(W, H, codec, state)
            same = (codes == expected).all(2).float().mean()
            assert float(same) > 0.98  # where two codes are equally good, rounding decides
            assert loss(codes, W, H, codec, state) == pytest.approx(
                loss(expected, W, H, codec, state), rel=2e-3
            )

    @each_codec
    def test_a_pass_of_one_coding_is_coordinate_descent(self, name: str) -> None:
        W, H = weights(37, 43), hessian(43)
        codec, state = fitted(name, W)
        found = []
        for beam in (None, 1):
            columns = TileColumns.of(W, H, codec, state)
            E = feedback(columns, 1, 16)
            if beam is None:
                coordinate.descend(columns, E, 16)
            else:
                descend(columns, E, beam, 16)
            found.append(columns.codes_IJM)
        assert float((found[0] == found[1]).all(2).float().mean()) > 0.98

    def test_all_codings_find_the_best(self) -> None:
        """With 4 entries and 4 columns of tiles, a beam of 64 keeps every partial coding."""
        W, H = weights(40, 8), hessian(8)
        codec = CODECS.get("kmeans").model_validate(
            {"type": "kmeans", "tile_cols": 2, "index_bits": 2}
        )
        state = codec.fit(to_tiles(W, (1, 2)), None, torch.Generator().manual_seed(0))
        every = torch.tensor(list(product(range(4), repeat=4)), dtype=torch.int32)
        rows = codec.decode(every[..., None], state).flatten(1)
        gap = W[:, None] - rows
        best = ((gap @ H) * gap).sum(2).argmin(1)
        codes, _ = rule("beam", beam=64, passes=0)(W, H, codec, state)
        assert torch.equal(codes[..., 0], every[best])
        ldlq, _ = rule("ldlq", passes=4)(W, H, codec, state)
        assert loss(codes, W, H, codec, state) < loss(ldlq, W, H, codec, state)

    @pytest.mark.parametrize("name", ["kmeans-2x2", "kmeans-3x1", "additive"])
    @pytest.mark.parametrize("stripe", [1, 16, 1000])
    def test_kept_errors_are_those_of_the_codes(self, name: str, stripe: int) -> None:
        W, H = weights(20, 48), hessian(48)
        codec, state = fitted(name, W)
        columns = TileColumns.of(W, H, codec, state)
        E = feedback(columns, 3, stripe)
        for _ in range(2):
            W_hat = reproduced(columns.codes_IJM, codec, state, W)
            torch.testing.assert_close(W - E, W_hat, atol=1e-5, rtol=0)
            descend(columns, E, 3, stripe)
        assert E.shape == W.shape

    @each_codec
    def test_repeats_and_leaves_its_input_alone(self, name: str) -> None:
        W, H = weights(20, 40), hessian(40)
        codec, state = fitted(name, W)
        before = W.clone(), H.clone(), {k: v.clone() for k, v in state.items()}
        beam = rule("beam", passes=1, pass_beam=2)
        first, _ = beam(W, H, codec, state)
        second, _ = beam(W, H, codec, state)
        assert torch.equal(first, second)
        assert torch.equal(W, before[0])
        assert torch.equal(H, before[1])
        assert all(torch.equal(state[k], v) for k, v in before[2].items())


class TestLoss:
    @each_codec
    @pytest.mark.parametrize(("order", "pass_beam"), [("natural", 3), ("hessian", 4)])
    def test_no_pass_raises_it(self, name: str, order: str, pass_beam: int) -> None:
        W, H = weights(25, 43), hessian(43)
        codec, state = fitted(name, W)
        losses = []
        for passes in range(4):
            beam = rule("beam", beam=2, passes=passes, order=order, pass_beam=pass_beam)
            codes, _ = beam(W, H, codec, state)
            assert codes.dtype == torch.int32
            losses.append(loss(codes, W, H, codec, state))
        for before, after in pairwise(losses):
            assert after <= before * (1 + 1e-5)
        assert losses[1] < losses[0]

    @each_codec
    def test_a_wider_beam_is_better_on_average(self, name: str) -> None:
        total = {1: 0.0, 2: 0.0, 6: 0.0}
        for seed in range(3):
            W, H = weights(48, 48, seed), hessian(48, seed)
            codec, state = fitted(name, W)
            for beam in total:
                codes, _ = rule("beam", beam=beam, passes=0)(W, H, codec, state)
                total[beam] += loss(codes, W, H, codec, state)
        assert total[6] < total[2] < total[1]
        assert total[6] < 0.985 * total[1]

    @each_codec
    def test_refining_improves_given_codes(self, name: str) -> None:
        W, H = weights(25, 43), hessian(43)
        codec, state = fitted(name, W)
        codes, _ = rule("nearest")(W, H, codec, state)
        for order, pass_beam in (("natural", 1), ("hessian", 3)):
            before = loss(codes, W, H, codec, state)
            beam = rule("beam", passes=0, order=order, pass_beam=pass_beam)
            refined, same_state = beam.refine(W, H, codec, codes, state)
            assert same_state is state
            assert loss(refined, W, H, codec, state) < 0.95 * before
            again, _ = beam.refine(W, H, codec, refined, state)
            assert loss(again, W, H, codec, state) <= loss(refined, W, H, codec, state) * (1 + 1e-5)

    def test_rows_of_tiles_stand_alone(self) -> None:
        W, H = weights(24, 40), hessian(40)
        codec, state = fitted("kmeans-2x2", W)
        beam = rule("beam", pass_beam=2)
        codes, _ = beam(W, H, codec, state)
        part, _ = beam(W[8:14], H, codec, state)
        assert torch.equal(codes[4:7], part)


def test_candidates_of_a_list_count_once() -> None:
    """A matrix with fewer distinct tiles than entries leaves entries that are near to nothing."""
    W = weights(16, 4).repeat(1, 4)
    codec, state = fitted("kmeans-1x4", W[:4])
    codes, _ = rule("beam", beam=8, pass_beam=8)(W[:4], hessian(16), codec, state)
    assert loss(codes, W[:4], hessian(16), codec, state) < 1e-5


@pytest.mark.parametrize(
    "codec",
    [
        {"type": "uniform"},
        {"type": "trellis"},
        {"type": "residual", "stages": [{"type": "uniform"}] * 2},
    ],
)
def test_codecs_with_one_code_a_tile_are_refused(codec: dict[str, Any]) -> None:
    values = {"name": "x", "codec": codec, "rounding": {"type": "beam"}}
    with pytest.raises(RecipeError, match=f"rounding beam: codec {codec['type']} finds one code"):
        recipes.from_dict(values, "test")


@pytest.mark.parametrize(
    "options", [{"beam": 0}, {"passes": -1}, {"pass_beam": 65}, {"order": "random"}]
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        rule("beam", **options)
