"""LDLQ over rows and columns, against its own formula, LDLQ and brute force."""

import pytest
import torch
from torch import Tensor

from vqllm import recipes
from vqllm.core import linalg
from vqllm.core.protocols import Codec
from vqllm.core.tiles import from_tiles, to_tiles
from vqllm.errors import NumericalError, RecipeError
from vqllm.rounding.ldlq import LDLQ
from vqllm.rounding.two_sided import TwoSided


def codec_of(options: dict[str, object]) -> Codec:
    values = {"name": "x", "codec": options, "rounding": {"type": "two_sided"}}
    return recipes.from_dict(values, "x").codec


def correlated(size: int, seed: int, rank: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(size, rank, generator=generator)
    return linalg.damp(A @ A.T / rank + 0.05 * torch.eye(size), 1e-3)


def problem(codec: Codec, rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    W = torch.randn(rows, cols, generator=torch.Generator().manual_seed(5))
    X = to_tiles(W, codec.tile)
    state = codec.fit(X, torch.ones_like(X), torch.Generator().manual_seed(0))
    return W, correlated(cols, 1), correlated(rows, 2), state


def decoded(codec: Codec, codes: Tensor, state: dict[str, Tensor], W: Tensor) -> Tensor:
    return from_tiles(codec.decode(codes, state), codec.tile, *W.shape)


def loss(E: Tensor, H_RR: Tensor, H_CC: Tensor) -> float:
    return float(((H_RR @ E @ H_CC) * E).sum())


CODES = [
    {"type": "e8p"},
    {"type": "kmeans", "tile_rows": 2, "tile_cols": 2, "index_bits": 6},
    {"type": "trellis", "bits": 2, "code": "mul1", "state_bits": 8},
]


@pytest.mark.parametrize("options", CODES, ids=lambda options: options["type"])
@pytest.mark.parametrize(("rows", "cols"), [(96, 64), (70, 50)])
def test_uncoupled_outputs_give_ldlq(options: dict[str, object], rows: int, cols: int) -> None:
    codec = codec_of(options)
    W, H, _, state = problem(codec, rows, cols)
    expected, _ = LDLQ()(W, H, codec, state)
    got, _ = TwoSided(rows=16).with_outputs(torch.eye(rows))(W, H, codec, state)
    assert torch.equal(got, expected)


def test_diagonals_code_what_block_after_block_does(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = codec_of(
        {"type": "trellis", "bits": 2, "code": "bytes2", "state_bits": 8, "tile_rows": 32}
    )
    for rows, cols in ((160, 192), (100, 90), (20, 50)):
        W, H, H_O, state = problem(codec, rows, cols)
        found = []
        for alike in (True, False):
            monkeypatch.setattr(type(codec), "alike", alike)
            codes, _ = TwoSided(rows=32).with_outputs(H_O)(W, H, codec, state)
            found.append(loss(W - decoded(codec, codes, state, W), H_O, H))
        assert found[0] == pytest.approx(found[1], rel=0.02)


def test_threads_change_no_code() -> None:
    codec = codec_of({"type": "trellis", "bits": 2, "state_bits": 8, "tile_rows": 64})
    W, H, H_O, state = problem(codec, 640, 128)
    before, found = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 4):
            torch.set_num_threads(num_threads)
            found.append(TwoSided(rows=64).with_outputs(H_O)(W, H, codec, state)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], codes) for codes in found)


@pytest.mark.parametrize("options", CODES, ids=lambda options: options["type"])
def test_the_loss_of_both_sides_falls_below_that_of_ldlq(options: dict[str, object]) -> None:
    codec = codec_of(options)
    W, H, H_O, state = problem(codec, 192, 128)
    one, _ = LDLQ()(W, H, codec, state)
    before = loss(W - decoded(codec, one, state, W), H_O, H)
    found = []
    for rows in (96, 32, 16):
        two, _ = TwoSided(rows=rows, damping=1e-4).with_outputs(H_O)(W, H, codec, state)
        found.append(loss(W - decoded(codec, two, state, W), H_O, H))
    assert found[0] < 0.95 * before
    assert found[-1] < 0.6 * before  # measured: 0.17 to 0.44
    assert found == sorted(found, reverse=True)


def test_the_loss_is_what_the_factors_leave() -> None:
    """Σ tr(D_O,b G D_k Gᵀ) with the gaps G between targets and codes, one weight a tile."""
    codec = codec_of({"type": "kmeans", "tile_rows": 1, "tile_cols": 1, "index_bits": 2})
    W, H, H_O, state = problem(codec, 12, 10)
    rounding = TwoSided(rows=1, damping=1e-6).with_outputs(H_O)
    codes, _ = rounding(W, H, codec, state)
    E = W - decoded(codec, codes, state, W)
    L_O, D_O = linalg.block_ldl(linalg.damp(H_O, 1e-6), 1)
    L, D = linalg.block_ldl(H, 1)
    gap = L_O.T @ E @ L
    book = codec.decode(torch.arange(4)[:, None, None], state).flatten().sort().values
    # Every gap is that of a nearest codeword, so at most half the way to the next one.
    target = gap + decoded(codec, codes, state, W)
    inside = (target > book[0]) & (target < book[-1])
    assert inside.any()
    assert float(gap[inside].abs().max()) <= float((book[1:] - book[:-1]).max()) / 2 + 1e-5
    expected = (D_O.flatten()[:, None] * gap.square() * D.flatten()).sum()
    assert loss(E, linalg.damp(H_O, 1e-6), H) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(
    "options", [{"type": "uniform", "bits": 3}, {"type": "grouped", "groups": 2}]
)
def test_codecs_with_something_for_every_row_are_refused(options: dict[str, object]) -> None:
    values = {"name": "x", "codec": options, "rounding": {"type": "two_sided"}}
    with pytest.raises(RecipeError, match=r"two_sided: codec \w+ .* every row"):
        recipes.from_dict(values, "x")


def test_a_head_has_no_gradients() -> None:
    head = {"codec": {"type": "e8p"}, "rounding": {"type": "two_sided"}}
    values = {"name": "x", "codec": {"type": "e8p"}, "rounding": {"type": "ldlq"}, "head": head}
    with pytest.raises(RecipeError, match="needs gradients in the outputs"):
        recipes.from_dict(values, "x")


def test_an_indefinite_hessian_of_outputs_is_damped_more(caplog: pytest.LogCaptureFixture) -> None:
    codec = codec_of({"type": "e8p"})
    W, H, _, state = problem(codec, 64, 64)
    direction = torch.randn(64, 1, generator=torch.Generator().manual_seed(3))
    indefinite = direction @ direction.T - 0.05 * torch.eye(64)
    with caplog.at_level("WARNING", logger="vqllm"):
        codes, _ = TwoSided(rows=16, damping=0.01).with_outputs(indefinite)(W, H, codec, state)
    assert "64 outputs is not positive definite: damping 0.1 in place of 0.01" in caplog.text
    expected, _ = TwoSided(rows=16, damping=0.1).with_outputs(indefinite)(W, H, codec, state)
    assert torch.equal(codes, expected)
    strong = torch.eye(64) + 3 * (torch.ones(64, 64) - torch.eye(64))
    with pytest.raises(NumericalError, match="not positive definite"):
        TwoSided(rows=16).with_outputs(strong)(W, H, codec, state)
