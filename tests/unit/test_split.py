"""Two codecs for one matrix: which columns are whose, tiles inside tiles, the stored tensors."""

import json

import pytest
import torch
from pydantic import ValidationError

from tests.support.gaussian import fitted, gaussian, generator
from vqllm.codecs import CODECS
from vqllm.core import linalg, metrics, rng, tiles
from vqllm.errors import RecipeError
from vqllm.rounding import ROUNDINGS
from vqllm.transforms import TRANSFORMS
from vqllm_kernels import formats
from vqllm_kernels.split.reference import num_columns


def column(rows, index_bits):
    return {"type": "kmeans", "tile_rows": rows, "tile_cols": 1, "index_bits": index_bits}


VPTQ = {"share": 0.1, "first": column(4, 6), "rest": column(6, 5)}
RESIDUAL = {"type": "residual", "stages": [column(12, 5), column(12, 3)], "beam": 1}
PAIRS = {"type": "kmeans", "tile_cols": 2, "index_bits": 5}
GROUPS = {
    "type": "grouped_kmeans",
    "tile_cols": 4,
    "index_bits": 4,
    "group_rows": 3,
    "group_cols": 8,
    "fit": "once",
}
OPTIONS = {
    "4x1 and 6x1": VPTQ,
    "4x1 and a residual of 12x1": {**VPTQ, "rest": RESIDUAL},
    "groups of 1x4 and 3x2": {
        "share": 0.4,
        "first": GROUPS,
        "rest": {"type": "kmeans", "tile_rows": 3, "tile_cols": 2, "index_bits": 6},
    },
    "pairs and e8p": {"share": 0.6, "first": PAIRS, "rest": {"type": "e8p"}},
    "three parts": {"share": 0.1, "first": PAIRS, "rest": {"type": "split", **VPTQ, "share": 0.5}},
}
each = pytest.mark.parametrize("name", OPTIONS)


def build(**options):
    return CODECS.get("split").model_validate({"type": "split", **options})


@pytest.mark.parametrize(
    ("share", "num", "first"),
    [(0.01, 1, 0), (0.01, 2, 1), (0.01, 149, 1), (0.01, 150, 2), (0.01, 4096, 41), (0.5, 3, 2)],
)
def test_number_of_columns(share, num, first):
    assert num_columns(share, num) == (first, num - first)


def test_tile_is_the_smallest_that_holds_whole_tiles_of_both():
    assert build(**VPTQ).tile == (12, 1)
    assert build(**OPTIONS["groups of 1x4 and 3x2"]).tile == (3, 4)
    assert build(**OPTIONS["three parts"]).tile == (12, 2)


@each
def test_each_part_codes_its_columns_as_if_they_were_a_matrix(name):
    codec = build(**OPTIONS[name])
    W = gaussian(24, 40)
    _, state, codes = fitted(codec, W)
    first = num_columns(codec.share, codes.shape[1])[0] * codec.tile[1]
    W_hat = tiles.from_tiles(codec.decode(codes, state), codec.tile, 24, 40)
    draw = generator()
    for part, own in ((codec.first, slice(0, first)), (codec.rest, slice(first, None))):
        X = tiles.to_tiles(W[:, own], part.tile)
        own_state = part.fit(X, None, draw)
        alone = part.decode(part.encode(X, own_state), own_state)
        assert torch.equal(W_hat[:, own], tiles.from_tiles(alone, part.tile, *W[:, own].shape))


def test_symbols_are_those_of_the_inner_tiles_then_zeros():
    codec = build(**VPTQ)
    X, state, codes = fitted(codec, gaussian(24, 40))
    assert codes.shape == (2, 40, 3)
    inner = codec.first.encode(
        X[:, :4].unflatten(2, (3, 4)).transpose(1, 2).flatten(0, 1),
        {"codebook": state["first_codebook"]},
    )
    assert torch.equal(codes[:, :4], inner.unflatten(0, (2, 3)).squeeze(3).transpose(1, 2))
    assert not bool(codes[:, 4:, 2:].any())


@each
@pytest.mark.parametrize("shape", [(12, 1), (1, 2), (13, 5), (50, 41)], ids=str)
def test_packing_is_lossless_and_read_alike(name, shape):
    codec = build(**OPTIONS[name])
    _, state, codes = fitted(codec, gaussian(*shape))
    packed = codec.pack(codes, state)
    spec = formats.from_dict(json.loads(json.dumps(codec.spec().to_dict())))
    assert spec == codec.spec()
    layout = spec.layout(*shape)
    assert {k: (tuple(t.shape), t.dtype) for k, t in packed.items()} == {
        k: (t.shape, t.dtype) for k, t in layout.items()
    }
    unpacked, unpacked_state = codec.unpack(packed, *shape)
    assert torch.equal(unpacked, codes)
    assert unpacked_state.keys() == state.keys()
    assert all(torch.equal(unpacked_state[key], state[key]) for key in state)
    W_hat = tiles.from_tiles(codec.decode(codes, state), codec.tile, *shape)
    assert torch.equal(spec.decode(packed, *shape), W_hat)
    index = torch.tensor([shape[0] - 1, 0, shape[0] // 2])
    assert torch.equal(spec.decode_rows(packed, index, shape[1]), W_hat[index])


def test_every_name_is_stored_at_every_size():
    spec = build(**VPTQ).spec()
    assert spec.layout(1, 1).keys() == spec.layout(300, 400).keys()


def test_rows_of_tiles_can_be_stacked():
    codec = build(**VPTQ)
    W = gaussian(48, 40)
    _, state, codes = fitted(codec, W)
    parts = [codec.pack(codes[i : i + 2], state) for i in (0, 2)]
    layout = codec.spec().layout(48, 40)
    stacked = {
        name: torch.cat([p[name] for p in parts]) if t.by_tile_row else parts[0][name]
        for name, t in layout.items()
    }
    whole = codec.spec().decode(codec.pack(codes, state), 48, 40)
    assert torch.equal(codec.spec().decode(stacked, 48, 40), whole)


@each
def test_projection_is_that_of_the_parts(name):
    codec = build(**OPTIONS[name])
    _, state, codes = fitted(codec, gaussian(24, 40))
    same = codec.project(state)
    assert same.keys() == state.keys()
    assert all(torch.equal(same[k], v) and same[k].dtype == v.dtype for k, v in state.items())
    moved = {k: 1.01 * v.float() if v.is_floating_point() else v for k, v in state.items()}
    stored = codec.project(moved)
    assert all(stored[k].dtype == state[k].dtype for k in state)
    assert codec.pack(codes, stored).keys() == codec.pack(codes, state).keys()


def test_weights_reach_parts_of_the_same_tile_only():
    assert build(share=0.1, first=PAIRS, rest=PAIRS).weighted
    assert not build(**VPTQ).weighted
    uniform = {"type": "uniform"}
    assert not build(share=0.1, first=uniform, rest=uniform).weighted


def test_outlier_columns_lower_the_loss():
    """The arrangement of VPTQ: columns sorted by diag(H), 5 % of them with more bits."""
    W = gaussian(192, 160)
    x = (
        gaussian(640, 160, seed=1)
        @ gaussian(160, 160, seed=2)
        * (1.5 * gaussian(160, seed=3)).exp()
    )
    sort = TRANSFORMS.get("permutation").model_validate(
        {"type": "permutation", "side": "in", "by": "hessian"}
    )
    W, H, _ = sort.forward(W, x.T @ x / 640, rng.generator(0, "", ""))
    H = linalg.damp(H, 0.01)
    ldlq = ROUNDINGS.get("ldlq").model_validate({"type": "ldlq", "order": "hessian"})
    losses = []
    for codec in (
        CODECS.get("kmeans").model_validate(column(4, 8)),
        build(share=0.05, first=column(2, 8), rest=column(4, 8)),
    ):
        weight = tiles.to_tiles(torch.diagonal(H).expand(W.shape), codec.tile)
        state = codec.fit(tiles.to_tiles(W, codec.tile), weight, generator())
        codes, state = ldlq(W, H, codec, state)
        W_hat = codec.spec().decode(codec.pack(codes, state), *W.shape)
        losses.append(metrics.proxy_loss(W, W_hat, H))
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**VPTQ, "first": {"tile_rows": 4}}, "has no `type`; allowed are"),
        ({**VPTQ, "rest": "kmeans"}, "part 'kmeans' has no `type`"),
        ({**VPTQ, "rest": {"type": "kmean"}}, "unknown codec 'kmean'. Did you mean 'kmeans'"),
        ({**VPTQ, "rest": {"type": "grouped_kmeans"}}, "set its fit to once"),
    ],
)
def test_parts_that_do_not_fit(options, message):
    with pytest.raises(RecipeError, match=message):
        build(**options)


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, True, "half"])
def test_share_out_of_range(share):
    with pytest.raises(ValidationError):
        build(**{**VPTQ, "share": share})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 1.0}, "share 1.0; allowed is more than 0 and less than 1"),
        ({"rest": {"format": "e9p-v1"}}, "unknown format 'e9p-v1'"),
        ({"middle": 1}, r"fields .*expected \['first', 'rest', 'share'\]"),
    ],
)
def test_fields_of_the_format_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        formats.from_dict({**build(**VPTQ).spec().to_dict(), **change})
