"""Codebooks for groups: what a group is, the forms of a codebook, scales, the fit inside LDLQ."""

import pytest
import torch
from pydantic import ValidationError

from tests.support.gaussian import fitted, gaussian, generator
from vqllm.codecs import CODECS, lloyd
from vqllm.core import linalg, metrics, tiles
from vqllm.errors import NumericalError, RecipeError
from vqllm.recipes import from_dict
from vqllm.rounding import ROUNDINGS
from vqllm_kernels import formats
from vqllm_kernels.bitpack import unpack_bits
from vqllm_kernels.lut.spec import GroupedLutSpec

GROUPED = {"index_bits": 3, "group_rows": 4, "group_cols": 8}
SCALAR = {**GROUPED, "tile_cols": 1}
FORMS = {
    "float16": {**GROUPED, "codebook": "float16"},
    "int8": {**GROUPED, "codebook": "int8"},
    "svd": {**SCALAR, "codebook": "svd"},
    "scales": {**GROUPED, "scale_cols": 4},
    "svd with scales": {**SCALAR, "codebook": "svd", "rank": 3, "scale_cols": 16},
}
each_form = pytest.mark.parametrize("form", FORMS)


def build(**options):
    return CODECS.get("grouped_kmeans").model_validate({"type": "grouped_kmeans", **options})


def error(codec, W_RC):
    X_IJE, state, codes_IJM = fitted(codec, W_RC)
    return float((codec.decode(codes_IJM, state) - X_IJE).square().mean())


def same(a, b):
    return set(a) == set(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@each_form
def test_weights_are_read_as_the_format_says(form):
    """The definition, tile by tile."""
    codec = build(**FORMS[form])
    R, C = 11, 21
    _, state, codes_IJM = fitted(codec, gaussian(R, C))
    packed = codec.pack(codes_IJM, state)
    index = unpack_bits(packed["codes"], 3, codes_IJM.shape[1])
    W_RC = torch.empty(R, C)
    for row in range(R):
        for col in range(C):
            g, h, tile_col = row // 4, col // 8, col // codec.tile_cols
            entry, e = int(index[row, tile_col]), col % codec.tile_cols
            if codec.codebook == "svd":
                weight = torch.zeros(())
                for factor, vector in zip(packed["coefficients"][g, h], packed["basis"]):
                    weight = weight + factor.float() * vector[entry]
            else:
                weight = packed["codebook"][g, h, entry, e].float()
                if codec.codebook == "int8":
                    weight = weight * packed["codebook_scale"][g, h].float()
            if codec.scale_cols:
                block = col // codec.scale_cols
                at = (int(packed["scale_index"][row, block // 2]) >> 4 * (block % 2)) & 15
                weight = weight * packed["scale_table"][block, at].float()
            W_RC[row, col] = weight
    assert torch.equal(codec.spec().decode(packed, R, C), W_RC)


def test_each_entry_is_the_mean_of_its_tiles_in_its_group():
    codec = build(index_bits=2, group_rows=16, group_cols=32, codebook="float16", iterations=60)
    X, state, codes = fitted(codec, gaussian(24, 40))
    assert state["codebook"].shape == (2, 2, 4, 2)
    for g in range(2):
        for h in range(2):
            own = (slice(16 * g, 16 * g + 16), slice(16 * h, 16 * h + 16))
            for entry in range(4):
                mean = X[own][codes[own][..., 0] == entry].mean(0)
                kept = state["codebook"][g, h, entry].float()
                torch.testing.assert_close(kept, mean, rtol=2e-3, atol=2e-3)


def test_groups_are_fitted_as_if_alone():
    x_GNE, start_GKE = gaussian(5, 200, 3), gaussian(5, 16, 3, seed=1)
    for weight_GNE in (None, gaussian(5, 200, 1, seed=2).exp(), gaussian(5, 200, 3, seed=3).exp()):
        together = lloyd.lloyd(x_GNE, weight_GNE, start_GKE, 8)
        for g in range(5):
            weight = None if weight_GNE is None else weight_GNE[g : g + 1]
            alone = lloyd.lloyd(x_GNE[g : g + 1], weight, start_GKE[g : g + 1], 8)
            torch.testing.assert_close(together[g], alone[0])


def test_assignment_is_that_of_brute_force():
    x, entries, weight = gaussian(3, 500, 4), gaussian(3, 32, 4, seed=1), gaussian(3, 500, 4).exp()
    for weight_GNE in (None, weight):
        gap_GNKE = (x[:, :, None] - entries[:, None]).double() ** 2
        distance_GNK = (gap_GNKE if weight_GNE is None else weight_GNE[:, :, None] * gap_GNKE).sum(
            3
        )
        index_GN = lloyd.assign(x, weight_GNE, entries)
        chosen_GN = distance_GNK.gather(2, index_GN[..., None])[..., 0]
        torch.testing.assert_close(chosen_GN, distance_GNK.amin(2), rtol=1e-5, atol=1e-5)


def test_mahalanobis_start_takes_evenly_spaced_ranks():
    x = gaussian(2, 64, 3) @ gaussian(3, 3, seed=1) + 5
    start = lloyd.start(x, None, 8, "mahalanobis", generator())
    for g in range(2):
        gap = (x[g] - x[g].mean(0)).double()
        rank = (gap @ (gap.T @ gap / 64).inverse() * gap).sum(1).argsort()
        assert torch.equal(start[g], x[g][rank[4::8]])


@pytest.mark.parametrize(
    ("init", "tile_cols", "worse"),
    [
        ("kmeans++", 1, 1.15),
        ("mahalanobis", 1, 1.3),
        ("kmeans++", 2, 1.0),
        ("mahalanobis", 2, 1.05),
    ],
)
def test_no_start_is_better_than_that_of_auto(init, tile_cols, worse):
    options = {"tile_cols": tile_cols, "index_bits": 4, "group_rows": None, "group_cols": 64}
    W = gaussian(64, 256)
    best = error(build(**options), W)
    assert 0.99 * best < error(build(**options, init=init), W) <= worse * best


def test_a_codebook_for_each_group_follows_the_weights():
    size_RC = torch.logspace(-2, 2, 8).repeat_interleave(8)[:, None]
    size_RC = size_RC * torch.logspace(-1, 1, 4).repeat_interleave(64)
    W = gaussian(64, 256) * size_RC
    codec = build(index_bits=4, group_rows=8, group_cols=64)
    _, state, codes = fitted(codec, W)
    W_hat = tiles.from_tiles(codec.decode(codes, state), codec.tile, *W.shape)
    # One group of another size would already have an error of 1.
    assert float(((W_hat - W) / size_RC).square().mean()) < 0.11


@pytest.mark.parametrize("codebook", ["float16", "int8"])
def test_bits_a_weight(codebook):
    codec = build(index_bits=4, group_rows=8, group_cols=256, codebook=codebook)
    entries = 16 * 2 * (16 if codebook == "float16" else 8) + (codebook == "int8") * 16
    assert codec.bits(64, 1024).total == 64 * 1024 * (2 + entries / 2048)


def test_bits_of_scales_and_factors():
    codec = build(tile_cols=1, index_bits=3, group_rows=2, group_cols=256, codebook="svd")
    assert codec.bits(64, 1024).total == 64 * 1024 * (3 + 4 * 8 / 512) + 4 * 8 * 32
    scaled = build(index_bits=4, group_rows=16, group_cols=256, scale_cols=64)
    plain = build(index_bits=4, group_rows=16, group_cols=256)
    more = scaled.bits(64, 1024).total - plain.bits(64, 1024).total
    assert more == 64 * 1024 * 4 / 64 + 1024 / 64 * 16 * 16


@each_form
def test_projection_keeps_what_can_be_stored_and_rounds_the_rest(form):
    codec = build(**FORMS[form])
    X, state, codes = fitted(codec, gaussian(12, 24))
    assert same(codec.project(state), state)
    moved = {
        k: v.float() + 0.02 * v.float().abs().amax() * gaussian(*v.shape, seed=5)
        if v.is_floating_point()
        else v
        for k, v in state.items()
    }
    stored = codec.project(moved)
    assert same(codec.project(stored), stored)
    unpacked = codec.unpack(codec.pack(codes, stored), 12, 24)[1]
    assert same(unpacked, stored)
    gap = codec.decode(codes, stored) - codec.decode(codes, moved)
    assert float(gap.abs().max()) < 0.03 * float(X.abs().max())


def test_integers_are_symmetric_and_used_up():
    codec = build(**FORMS["int8"])
    _, state, codes = fitted(codec, gaussian(12, 24) * torch.logspace(-6, 3, 24))
    packed = codec.pack(codes, state)
    assert bool((packed["codebook"].abs().amax((2, 3)) == 127).all())
    exact = packed["codebook"].float() * packed["codebook_scale"].float()[..., None, None]
    assert torch.equal(exact, state["codebook"])


def test_factors_of_full_rank_lose_little_and_fewer_lose_more():
    W = gaussian(64, 64)
    options = {"tile_cols": 1, "index_bits": 2, "group_rows": 2, "group_cols": 64}
    errors = [error(build(**options, codebook="svd", rank=rank), W) for rank in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1.03 * error(build(**options, codebook="float16"), W)


def test_scales_make_rows_of_different_size_alike():
    size_R1 = torch.logspace(-3, 3, 64)[:, None]
    W = gaussian(64, 256) * size_R1
    options = {"index_bits": 4, "group_rows": None, "group_cols": None, "fit": "once"}
    codec = build(**options, scale_cols=64)
    _, state, codes = fitted(codec, W)
    W_hat = tiles.from_tiles(codec.decode(codes, state), codec.tile, *W.shape)
    relative_R = ((W_hat - W) / size_R1).square().mean(1)
    # The 16 scales are a factor of 10^(6/15) apart.
    assert float(relative_R.mean()) < 0.25
    assert float(relative_R.amax()) < 4 * float(relative_R.amin())


@each_form
def test_zeros_and_zero_groups(form):
    codec = build(**FORMS[form])
    W = gaussian(12, 24)
    W[:4, :8] = 0
    W[6] = 0
    for matrix in (W, torch.zeros(12, 24)):
        X, state, codes = fitted(codec, matrix)
        decoded = codec.decode(codes, state)
        assert bool(decoded.isfinite().all())
        assert torch.equal(decoded[:4, : 8 // codec.tile_cols], X[:4, : 8 // codec.tile_cols])


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4])
def test_weights_of_any_size(scale):
    W = gaussian(16, 64)
    for form in ("int8", "svd", "scales"):
        codec = build(**FORMS[form])
        assert error(codec, scale * W) == pytest.approx(scale**2 * error(codec, W), rel=0.05)


def problem(rows=64, cols=128, seed=0):
    """W of rows of different size, and a damped H of correlated features of different size."""
    W = gaussian(rows, cols, seed=seed) * gaussian(rows, 1, seed=1).exp()
    x = (
        gaussian(4 * cols, cols, seed=2)
        @ gaussian(cols, cols, seed=3)
        * gaussian(cols, seed=4).exp()
    )
    return W, linalg.damp(x.T @ x / len(x), 0.01)


def ldlq_loss(codec, W, H):
    rounding = ROUNDINGS.get("ldlq").model_validate({"type": "ldlq"})
    weight = tiles.to_tiles(torch.diagonal(H).expand(W.shape), codec.tile)
    state = codec.fit(tiles.to_tiles(W, codec.tile), weight, generator())
    codes, state = rounding(W, H, codec, state)
    return metrics.proxy_loss(W, codec.spec().decode(codec.pack(codes, state), *W.shape), H)


def test_codebooks_fitted_inside_the_loop_are_better():
    W, H = problem()
    for form in ("float16", "int8", "svd", "scales"):
        once = ldlq_loss(build(**FORMS[form], fit="once"), W, H)
        assert ldlq_loss(build(**FORMS[form]), W, H) < 0.97 * once


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", ["int8", "svd"])
def test_same_bytes_with_any_number_of_threads(form, weighted):
    codec = build(**{**FORMS[form], "group_rows": 16, "group_cols": 64, "iterations": 4})
    X = tiles.to_tiles(gaussian(256, 128), codec.tile)
    weight = gaussian(1, *X.shape[1:], seed=6).exp() if weighted else None
    threads = torch.get_num_threads()
    states = []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            state = codec.fit(X, weight, generator())
            own = slice(64 // codec.tile_cols, None)
            own_weight = None if weight is None else weight[:, own]
            states.append(codec.refit(1.1 * X[:, own], own_weight, state, own.start))
    finally:
        torch.set_num_threads(threads)
    assert same(*states)


def test_refit_changes_its_group_only():
    codec = build(**FORMS["int8"])
    X, state, _ = fitted(codec, gaussian(12, 32))
    before = {k: v.clone() for k, v in state.items()}
    moved = codec.refit(2 * X[:, 8:12] + 1, None, state, 8)
    assert same(state, before)
    assert same(codec.project(moved), moved)
    changed = (moved["codebook"] != state["codebook"]).flatten(2).any(2)
    assert changed.tolist() == [[False, False, True, False]] * 3


def test_refit_lowers_the_error_of_what_it_is_given():
    codec = build(**FORMS["float16"])
    X, state, _ = fitted(codec, gaussian(12, 32))
    X = 1.5 * X[:, 4:8] + 0.3
    weight = gaussian(1, 4, 2, seed=8).exp()

    def error_of(state):
        codes = codec.encode(X, state, 4)
        return float((weight * (codec.decode(codes, state, 4) - X) ** 2).mean())

    assert error_of(codec.refit(X, weight, state, 4)) < 0.7 * error_of(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_cols": 7}, r"group_cols is 7; allowed are multiples of tile_cols \(2\)"),
        ({"tile_rows": 3, "group_rows": 4}, r"group_rows is 4; allowed are multiples of tile_rows"),
        ({"scale_cols": 3}, r"scale_cols is 3; allowed are multiples of tile_cols \(2\)"),
        ({"group_cols": None}, "fit per_group with group_cols null"),
        ({"rank": 2}, "rank 2 with codebook int8; only svd has a rank"),
        ({"codebook": "svd"}, r"svd with tiles \(1, 2\)"),
        ({"codebook": "svd", "tile_cols": 1, "rank": 257}, "rank 257; allowed is 1 to 256"),
        ({"init": "kmeans++", "index_bits": 13}, "kmeans.. with 8192 entries; it is for 4096"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(RecipeError, match=message):
        build(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"tile_cols": 0},
        {"tile_cols": 65},
        {"index_bits": 0},
        {"index_bits": 17},
        {"group_rows": 0},
        {"codebook": "int4"},
        {"fit": "twice"},
        {"group_cols": True},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ValidationError):
        build(**options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"index_bits": 17}, "1..16 bits"),
        ({"group_cols": 3}, "group_cols is 3; allowed are multiples of 2"),
        ({"scale_cols": -2}, "scale_cols is -2; allowed are multiples of 2"),
        ({"codebook": "int4"}, "codebook 'int4'; allowed are float16, int8, svd"),
        ({"codebook": "svd", "rank": 2}, "codebook svd of rank 2 with tiles"),
        ({"rank": 2}, "rank 2 with codebook float16; allowed is None"),
    ],
)
def test_fields_of_the_format_that_do_not_fit(fields, message):
    values = GroupedLutSpec(tile_rows=1, tile_cols=2, index_bits=4).to_dict()
    with pytest.raises(ValueError, match=message):
        formats.from_dict({**values, **fields})


def test_order_by_hessian_is_refused_when_the_recipe_is_read():
    codec = {"type": "grouped_kmeans"}
    rounding = {"type": "ldlq", "order": "hessian"}
    with pytest.raises(RecipeError, match="order hessian with codec grouped_kmeans"):
        from_dict({"name": "x", "codec": codec, "rounding": rounding}, "test")
    once = {"name": "x", "codec": {**codec, "fit": "once"}, "rounding": rounding}
    assert from_dict(once, "test").codec.refit_cols is None


def test_sums_of_codebooks_that_move_are_refused():
    stage = {"type": "grouped_kmeans"}
    with pytest.raises(RecipeError, match="set its fit to once"):
        CODECS.get("residual").model_validate({"type": "residual", "stages": [stage, stage]})
    once = {**stage, "fit": "once", "group_rows": 4, "index_bits": 3}
    codec = CODECS.get("residual").model_validate({"type": "residual", "stages": [once, once]})
    W = gaussian(16, 24)
    _, state, codes = fitted(codec, W)
    packed = codec.pack(codes, state)
    rows = torch.tensor([9, 2, 15])
    whole = codec.spec().decode(packed, 16, 24)
    assert torch.equal(codec.spec().decode_rows(packed, rows, 24), whole[rows])


def test_weights_too_large_for_float16():
    with pytest.raises(NumericalError, match=r"codec grouped_kmeans: .* do not fit a float16"):
        fitted(build(**FORMS["float16"]), 1e6 * gaussian(8, 16))


def test_checkpoints_of_one_codebook_read_as_before():
    values = {"format": "lut-v1", "tile_rows": 1, "tile_cols": 2, "index_bits": 3}
    spec = formats.from_dict(values)
    assert spec.to_dict() == values
    assert list(spec.layout(4, 6)) == ["codes", "codebook"]
