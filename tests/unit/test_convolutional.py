"""Convolutional codes: their bits, the search for the nearest, the choice of maps and scales."""

import itertools
import math

import pytest
import torch
from pydantic import ValidationError

from tests.support.gaussian import gaussian
from vqllm.codecs import CODECS, base, convolutional
from vqllm.codecs.base import nearest_entry
from vqllm.codecs.convolutional_maps import KNOWN, Constants
from vqllm.core.tiles import to_tiles
from vqllm.errors import RecipeError
from vqllm_kernels import formats, layout
from vqllm_kernels.convolutional import reference

CPU = torch.device("cpu")
PAPER = Constants(8, 4, 6, 3, "linear")
SPEC = {
    "format": "convolutional-v1",
    "index_bits": 8,
    "tile_cols": 4,
    "window": 6,
    "shift": 3,
    "levels": "linear",
    "group": 64,
}
each_code = pytest.mark.parametrize("constants", KNOWN, ids=lambda c: "-".join(map(str, c)))


def build(constants=None, **options):
    values = {} if constants is None else constants._asdict()
    return CODECS.get("convolutional").model_validate(
        {"type": "convolutional", **values, **options}
    )


def fitted(W_RC, constants=None, weight_RC=None, **options):
    codec = build(constants, **options)
    X_IJE = to_tiles(W_RC, codec.tile)
    weight_IJE = None if weight_RC is None else to_tiles(weight_RC, codec.tile)
    return codec, X_IJE, codec.fit(X_IJE, weight_IJE, torch.Generator())


def distortion(codec, X_IJE, state):
    return float((codec.decode(codec.encode(X_IJE, state), state) - X_IJE).square().mean())


def test_the_bits_of_a_code_as_the_paper_has_them():
    """In float32, with a scale and an offset that are not whole numbers."""
    a, c = 1935, 20084
    table_KE = convolutional._table(a, c, PAPER, CPU)
    for code in range(256):
        v = math.floor(code * (a / 16) + (c / 16 - 0.5) + 0.5)
        assert table_KE[code].tolist() == [((v >> at) & 63) - 32 for at in (9, 6, 3, 0)]


def test_known_weights():
    # v = 3, 19, 35: the last window ends at bit 0.
    code_map_12 = torch.tensor([[16 * 16, 3 * 16 + 15]], dtype=torch.int32)
    codes_1J = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    w = reference.weights(codes_1J, code_map_12, 4, 6, 3, "linear")[0]
    assert w.tolist() == [[-32, -32, -32, -29], [-32, -32, -30, -13], [-32, -32, -28, 3]]
    bent = reference.weights(codes_1J, code_map_12, 4, 6, 3, "cubic")[0]
    assert bent[0, :2].tolist() == [-52.0, -52.0]
    assert float(bent[2, 3]) == 3 * (1 + 5 * 9 / 8192)


@each_code
def test_neighbours_share_bits(constants):
    table_KE = convolutional._table(*KNOWN[constants].maps[0], constants, CPU)
    assert len(table_KE.unique(dim=0)) == 1 << constants.index_bits
    if constants.levels == "linear":
        u_KE = table_KE.int() + (1 << constants.window - 1)
        shared = constants.window - constants.shift
        tail_KE = u_KE[:, :-1] & ((1 << shared) - 1)
        assert torch.equal(tail_KE, u_KE[:, 1:] >> constants.shift)


@each_code
def test_maps_are_exact_in_float32_and_int32(constants):
    for a, c in KNOWN[constants].maps:
        codes = range(1 << constants.index_bits)
        v = torch.tensor([(a * k + c) // 16 for k in codes])
        assert a * codes[-1] + c < 1 << 24
        in_float = torch.tensor(codes).float() * (a / 16) + c / 16
        assert torch.equal(in_float.floor().long(), v)


@each_code
def test_every_map_of_the_list_is_good(constants):
    """With its own best scale, which is that of Gaussian weights; 8192 tiles tell 1 % apart."""
    x_NE = gaussian(1 << 13, constants.tile_cols, seed=3)
    errors = []
    for pair in KNOWN[constants].maps:
        table_KE = convolutional._table(*pair, constants, CPU)
        hat_NE = table_KE[convolutional._nearest(x_NE / KNOWN[constants].unit, table_KE)]
        best = (hat_NE * x_NE).sum() / hat_NE.square().sum()
        assert float(best) == pytest.approx(KNOWN[constants].unit, rel=0.02)
        errors.append(float((best * hat_NE - x_NE).square().mean()))
    assert max(errors) < 1.03 * min(errors)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize(
    ("num", "entries", "elements"), [(1, 256, 4), (513, 256, 3), (700, 2048, 4), (20000, 100, 2)]
)
def test_search_in_a_table_equals_brute_force(num, entries, elements, num_threads):
    pytest.importorskip("numba")
    from vqllm.codecs.search import codebook_numba as nearest_numba

    x_NE, table_KE = gaussian(num, elements), gaussian(entries, elements, seed=1)
    index_N = nearest_numba.nearest(x_NE.numpy(), table_KE.numpy(), num_threads)
    error_N = (x_NE - table_KE[torch.from_numpy(index_N)]).square().sum(1)
    ideal_N = torch.cdist(x_NE.double(), table_KE.double()).square().amin(1)
    torch.testing.assert_close(error_N.double(), ideal_N, rtol=1e-5, atol=1e-6)


def test_the_first_of_equal_entries_is_found():
    pytest.importorskip("numba")
    from vqllm.codecs.search import codebook_numba as nearest_numba

    table_KE = gaussian(20, 4).repeat(3, 1)
    index_N = nearest_numba.nearest(table_KE.numpy(), table_KE.numpy(), 1)
    assert index_N.tolist() == [*range(20)] * 3


def test_no_vectors_are_no_codes():
    assert convolutional._nearest(torch.empty(0, 4), gaussian(256, 4)).shape == (0,)


@each_code
def test_without_numba_the_codes_are_as_near(constants, monkeypatch):
    codec, X_IJE, state = fitted(gaussian(6, 50), constants, group=None)
    with_numba = distortion(codec, X_IJE, state)
    monkeypatch.setattr(base, "has_numba", lambda: False)
    assert distortion(codec, X_IJE, state) == pytest.approx(with_numba, rel=1e-6)


@pytest.mark.parametrize("weight", ["none", "elements", "matrix"])
def test_coding_equals_brute_force_over_all_codes(weight):
    codec, X_IJE, state = fitted(gaussian(12, 44), group=12)
    assert len(state["code_map"].unique(dim=0)) > 1
    factor_EE = gaussian(4, 4, seed=5)
    weight_E = {
        "none": None,
        "elements": torch.tensor([0.1, 1.0, 3.0, 0.5]),
        "matrix": factor_EE @ factor_EE.T + 0.1 * torch.eye(4),
    }[weight]
    weight_EE = torch.eye(4) if weight_E is None else weight_E
    weight_EE = torch.diag(weight_EE) if weight_EE.dim() == 1 else weight_EE

    def errors(codes_IJM):
        gap_IJE = (codec.decode(codes_IJM, state) - X_IJE).double()
        return ((gap_IJE @ weight_EE.double()) * gap_IJE).sum(2)

    every = [errors(torch.full((*X_IJE.shape[:2], 1), k, dtype=torch.int32)) for k in range(256)]
    own = errors(codec.encode(X_IJE, state, weight_E=weight_E))
    torch.testing.assert_close(own, torch.stack(every).amin(0), rtol=1e-4, atol=1e-6)


def test_a_stripe_knows_its_group():
    codec, X_IJE, state = fitted(gaussian(8, 200), group=24)
    codes_IJM = codec.encode(X_IJE, state)
    for col in (0, 5, 6, 49):
        stripe = codec.encode(X_IJE[:, col : col + 1], state, col)
        assert torch.equal(stripe, codes_IJM[:, col : col + 1])


def test_more_maps_are_better_and_rows_differ():
    W_RC = gaussian(128, 256)
    errors = []
    for maps in (1, 2, 4, 8):
        codec, X_IJE, state = fitted(W_RC, group=None, maps=maps)
        assert len(state["code_map"].unique(dim=0)) == maps
        errors.append(distortion(codec, X_IJE, state))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.96 * errors[0]


def test_group_scales_follow_the_weights():
    size_C = torch.tensor([1.0, 0.3, 3.0, 0.6]).repeat_interleave(64)
    W_RC = gaussian(32, 256) * size_C
    codec, X_IJE, state = fitted(W_RC, group=64)
    assert distortion(codec, X_IJE / size_C.unflatten(0, (-1, 4)), state) > 0  # of the right shape
    whole, _, whole_state = fitted(W_RC, group=None)
    assert distortion(codec, X_IJE, state) < 0.7 * distortion(whole, X_IJE, whole_state)
    mean_G = state["group_scale"].float().mean(0)
    torch.testing.assert_close(
        mean_G / mean_G[2], torch.tensor([1, 0.3, 3, 0.6]) / 3, rtol=0.15, atol=0
    )


def test_the_scales_fit_gaussian_weights_of_any_size():
    for constants, size in itertools.product(KNOWN, (1e-20, 1.0, 1e20)):
        codec, X_IJE, state = fitted(size * gaussian(4, 4092), constants, group=None, maps=1)
        mean = float(state["super_scale"].mean() * state["group_scale"].float().mean())
        assert mean / size == pytest.approx(KNOWN[constants].unit, rel=0.04)
        X_hat_IJE = codec.decode(codec.encode(X_IJE, state), state)
        assert float(((X_hat_IJE - X_IJE) / size).square().mean()) < 0.13


def test_no_other_scale_of_a_row_is_much_better():
    codec, X_IJE, state = fitted(gaussian(16, 512), group=None)
    best = distortion(codec, X_IJE, state)
    for factor in (0.9, 0.95, 1.05, 1.1):
        scaled = {**state, "super_scale": factor * state["super_scale"]}
        assert distortion(codec, X_IJE, scaled) > 0.998 * best


def test_important_columns_get_the_scale_that_suits_them():
    W_RC = gaussian(64, 256)
    W_RC[:, ::4] *= 2
    weight_RC = torch.ones(64, 256)
    weight_RC[:, ::4] = 30
    codec, X_IJE, plain = fitted(W_RC)
    _, _, weighted = fitted(W_RC, weight_RC=weight_RC)

    def error(state):
        gap_IJE = codec.decode(codec.encode(X_IJE, state), state) - X_IJE
        return float((to_tiles(weight_RC, codec.tile) * gap_IJE.square()).mean())

    assert error(weighted) < 0.9 * error(plain)


@pytest.mark.parametrize("value", [0.0, 1.0, -3e-30, 1e30])
def test_constant_weights(value):
    W_RC = torch.full((5, 130), value)
    codec, X_IJE, state = fitted(W_RC)
    X_hat_IJE = codec.decode(codec.encode(X_IJE, state), state)
    assert bool(X_hat_IJE.isfinite().all())
    inside_IJE = to_tiles(torch.ones_like(W_RC), codec.tile) > 0
    gap = (X_hat_IJE - X_IJE)[inside_IJE].abs().max()
    assert float(gap) <= 0.3 * abs(value)


def test_zero_rows_and_groups_decode_to_zeros():
    W_RC = gaussian(4, 192)
    W_RC[1] = 0
    W_RC[2, 64:128] = 0
    codec, X_IJE, state = fitted(W_RC)
    X_hat_IJE = codec.decode(codec.encode(X_IJE, state), state)
    assert bool((X_hat_IJE[1] == 0).all())
    assert bool((X_hat_IJE[2, 16:32] == 0).all())
    # Another target than the one that the scales were fitted on, as in rounding with feedback.
    assert bool(codec.decode(codec.encode(X_IJE + 1, state), state).isfinite().all())


def test_rows_are_fitted_alone(monkeypatch):
    W_RC = gaussian(10, 96)
    weight_RC = gaussian(1, 96).square().expand(10, 96)
    _, _, state = fitted(W_RC, weight_RC=weight_RC)
    monkeypatch.setattr(convolutional, "_MAX_WEIGHTS", 300)
    _, _, parts = fitted(W_RC, weight_RC=weight_RC)
    assert all(torch.equal(state[name], parts[name]) for name in state)


def test_stored_bits():
    bits = build().bits(4096, 4096)
    assert bits.codes == 2 * 4096**2
    assert bits.codebook == 0
    # a 4-bit scale for 64 columns; a, c and the super scale for a row
    assert bits.side == 4096 * (4096 // 64 * 4 + 3 * 32)
    assert build(tile_cols=3, window=4, shift=2, group=63).bits(1, 3).codes == 8
    assert build(index_bits=10).bits(16, 4096).codes == 10 * 16 * 1024


def test_any_map_can_be_read_and_coded():
    """Maps from elsewhere: a different one in every row, none of the list."""
    codec, X_IJE, state = fitted(gaussian(6, 32))
    code_map_I2 = torch.tensor([[1935 - i, 17881 + 97 * i] for i in range(6)], dtype=torch.int32)
    own = {**state, "code_map": code_map_I2}
    codes_IJM = codec.encode(X_IJE, own)
    again, unpacked = codec.unpack(codec.pack(codes_IJM, own), 6, 32)
    assert torch.equal(again, codes_IJM)
    assert torch.equal(unpacked["code_map"], code_map_I2)
    assert distortion(codec, X_IJE, own) < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index_bits": 12}, "index_bits 12, tile_cols 4, .*; known are index_bits 8"),
        ({"shift": 4}, "shift 4, levels linear; known are"),
        ({"tile_cols": 3}, "tile_cols 3"),
        ({"group": 66}, "group 66 is not a multiple of tile_cols 4; use 64 or null"),
        (
            {"tile_cols": 3, "window": 4, "shift": 2},
            "group 64 is not a multiple of tile_cols 3; use 63 or null",
        ),
        ({"group": 2}, "group 2 is not a multiple of tile_cols 4; use 4 or null"),
    ],
)
def test_constants_that_do_not_fit_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        build(**options)


@pytest.mark.parametrize(
    "options", [{"maps": 0}, {"maps": 9}, {"group": 0}, {"levels": "square"}, {"maps": True}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValidationError):
        build(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index_bits": 13}, "index_bits 13 for windows that span 15 bits; allowed are 1..12"),
        ({"index_bits": 0}, "index_bits 0"),
        ({"window": 4, "shift": 1}, "index_bits 8 for windows that span 7 bits"),
        ({"window": 8, "shift": 8}, "span 32 bits; .* spans of index_bits..19"),
        ({"window": 9}, "window 9, shift 3; allowed are windows of 2..8"),
        ({"shift": 7}, "window 6, shift 7"),
        ({"tile_cols": 5}, r"tile_cols 5; allowed are 2\.\.4"),
        ({"levels": "square"}, "levels 'square'; allowed are linear and cubic"),
        ({"group": 62}, "group 62; allowed are multiples of tile_cols 4 and null"),
    ],
)
def test_specs_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=f"convolutional-v1: .*{message}"):
        formats.from_dict({**SPEC, **change})


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("codes", torch.zeros(4, 31, dtype=torch.uint8)),
        ("code_map", torch.zeros(4, 2)),
        ("group_scale", torch.zeros(4, 2, dtype=torch.uint8)),
        ("super_scale", torch.zeros(1)),
    ],
)
def test_damaged_tensors_are_refused(name, tensor):
    codec, X_IJE, state = fitted(gaussian(4, 128))
    packed = codec.pack(codec.encode(X_IJE, state), state)
    layout.check(packed, codec.spec().layout(4, 128), "linear")
    with pytest.raises(ValueError, match=name):
        layout.check({**packed, name: tensor}, codec.spec().layout(4, 128), "linear")


def test_near_entries_are_those_of_the_shared_search():
    x_NE = gaussian(300, 4)
    table_KE = convolutional._table(*KNOWN[PAPER].maps[0], PAPER, CPU)
    index_N = convolutional._nearest(x_NE * 16, table_KE)
    assert torch.equal(index_N.long(), nearest_entry(x_NE * 16, table_KE)[:, 0])
