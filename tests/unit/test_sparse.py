"""Outliers beside the codes of another codec: which they are, what they take, how they lie."""

import json
import math

import pytest
import torch

from tests.support.gaussian import fitted, gaussian
from vqllm.codecs import CODECS
from vqllm.core import tiles
from vqllm.errors import NumericalError, RecipeError
from vqllm_kernels import formats
from vqllm_kernels.sparse import reference
from vqllm_kernels.sparse.spec import SparseSpec

E8P = {"type": "e8p"}
COLUMN = {"type": "kmeans", "tile_rows": 4, "tile_cols": 1, "index_bits": 6}


def build(share=0.05, base=E8P):
    return CODECS.get("sparse").model_validate({"type": "sparse", "share": share, "base": base})


@pytest.mark.parametrize(
    ("share", "num_cols", "num"),
    [(0.005, 8, 1), (0.005, 576, 3), (0.005, 4096, 20), (0.5, 3, 2), (0.9, 1, 1)],
)
def test_number_of_outliers(share, num_cols, num):
    assert reference.num_outliers(share, num_cols) == num
    assert build(share, COLUMN).num_outliers(num_cols) == num


@pytest.mark.parametrize("base", [E8P, COLUMN], ids=lambda base: base["type"])
def test_the_largest_of_each_row_are_taken_out(base):
    codec, W = build(0.1, base), gaussian(24, 40)
    _, state, codes = fitted(codec, W)
    S = tiles.from_tiles(codec.outliers(state, codes.shape[1]), codec.tile, 24, 40)
    threshold = W.abs().sort(1, descending=True).values[:, 3:4]
    expected = torch.where(W.abs() >= threshold, W, 0).half().float()
    assert torch.equal(S, expected)
    rest = tiles.to_tiles(W - S, codec.tile)
    alone = codec.base.fit(rest, None, torch.Generator().manual_seed(0))
    assert all(torch.equal(alone[k], v) for k, v in codec.base_state(state).items())
    assert torch.equal(codes, codec.base.encode(rest, alone))


@pytest.mark.parametrize("shape", [(1, 8), (5, 37), (64, 576), (37, 43)], ids=str)
def test_bits_are_those_of_the_base_and_of_the_outliers(shape):
    rows, cols = shape
    codec = build(0.02, COLUMN)
    num = reference.num_outliers(0.02, cols)
    width = max(1, math.ceil(math.log2(cols)))
    padded_rows = -(-rows // 4) * 4
    bits, base = codec.bits(rows, cols), codec.base.bits(rows, cols)
    assert bits.total - base.total == padded_rows * (16 * num + 8 * math.ceil(num * width / 8))
    assert bits.codes - base.codes == bits.total - base.total


@pytest.mark.parametrize("num_cols", [1, 2, 3, 255, 256, 257, 65536, 65537, 300000])
def test_columns_survive_packing_at_any_width(num_cols):
    columns = torch.tensor([[0, num_cols - 1, num_cols // 2, num_cols // 3]] * 3)
    packed = reference.pack_columns(columns, num_cols)
    width = reference.index_bits(num_cols)
    assert 1 << width >= num_cols
    assert packed.shape == (3, -(-4 * width // 8))
    assert torch.equal(reference.unpack_columns(packed, 4, num_cols), columns)


def test_outliers_that_share_a_column_add_up():
    columns, values = torch.tensor([[1, 1, 4]]), torch.tensor([[2.0, 0.5, -1.0]]).half()
    assert reference.dense(columns, values, 0, 5).tolist() == [[0, 2.5, 0, 0, -1]]
    assert reference.dense(columns, values, 1, 2).tolist() == [[2.5, 0]]


def test_an_outlier_beyond_the_last_column_is_a_problem():
    codec, W = build(0.05), gaussian(8, 40)
    _, state, codes = fitted(codec, W)
    packed = codec.pack(codes, state)
    assert codec.spec().problem(packed, 8, 40) is None
    wrong = state["outlier_columns"].clone()
    wrong[3, -1] = 45
    packed["outlier_columns"] = reference.pack_columns(wrong, 40).unflatten(0, (-1, 1))
    assert codec.spec().problem(packed, 8, 40) == "an outlier stands in column 45 of 40"


def test_rows_of_tiles_can_be_stacked():
    """Linears that read the same input may be stored as one, without coding them again."""
    codec = build(0.05, COLUMN)
    top, bottom = gaussian(8, 40, seed=1), gaussian(12, 40, seed=2)
    _, state, _ = fitted(codec, torch.cat((top, bottom)))
    base = codec.base_state(state)
    parts = []
    for W in (top, bottom):
        own = codec.with_outliers(tiles.to_tiles(W, codec.tile), base)
        parts.append(codec.pack(codec.encode(tiles.to_tiles(W, codec.tile), own), own))
    layout, spec = codec.spec().layout(20, 40), codec.spec()
    stacked = {
        k: torch.cat([p[k] for p in parts]) if t.by_tile_row else parts[0][k]
        for k, t in layout.items()
    }
    apart = [spec.decode(p, len(W), 40) for p, W in zip(parts, (top, bottom))]
    assert torch.equal(spec.decode(stacked, 20, 40), torch.cat(apart))


def test_outliers_beyond_float16_are_named():
    W = gaussian(8, 40)
    W[2, 7] = 1e6
    with pytest.raises(NumericalError, match=r"codec sparse: weights up to 1e\+06 .* \(65504\)"):
        fitted(build(), W)


def test_tuning_stays_within_float16():
    codec = build()
    _, state, _ = fitted(codec, gaussian(8, 40))
    tuned = {k: v * 1e6 if k == "outlier_values" else v for k, v in state.items()}
    assert float(codec.project(tuned)["outlier_values"].abs().max()) == 65504
    assert all(torch.equal(codec.project(state)[k], v) for k, v in state.items())


def test_the_form_of_a_specification():
    spec = build(0.05).spec()
    values = json.loads(json.dumps(spec.to_dict()))
    assert values == {"format": "sparse-v1", "share": 0.05, "base": {"format": "e8p-v1"}}
    assert formats.from_dict(values) == spec
    with pytest.raises(ValueError, match=r"fields \['base'\], expected \['base', 'share'\]"):
        formats.from_dict({"format": "sparse-v1", "base": {"format": "e8p-v1"}})
    with pytest.raises(ValueError, match="share 1; allowed is more than 0 and less than 1"):
        SparseSpec(share=1, base=build().spec().base)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"type": "e8q"}, "unknown codec 'e8q'"),
        ({"scale_factor": 1}, "codec sparse: base .* has no `type`"),
        ({"type": "sparse", "base": E8P}, "stores outliers itself"),
    ],
)
def test_bases_that_do_not_fit(base, message):
    with pytest.raises(RecipeError, match=message):
        build(base=base)
