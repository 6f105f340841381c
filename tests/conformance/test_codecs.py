"""What every registered codec must do, at every shape.

Configurations are the quick points that each codec names itself, and those below.
"""

import functools
import json

import pytest
import torch
from pydantic import ValidationError

from vqllm.codecs import CODECS, SearchableCodec
from vqllm.core import tiles
from vqllm.errors import NumericalError, RecipeError
from vqllm_kernels import formats, layout

EXTRA = {
    "uniform-1": {"type": "uniform", "bits": 1, "group": 16},
    "uniform-3-row": {"type": "uniform", "bits": 3, "group": None},
    "uniform-4-minmax": {"type": "uniform", "bits": 4, "group": 12, "clip": "minmax"},
    "uniform-8": {"type": "uniform", "bits": 8, "group": 128},
    "kmeans-1x1-3": {"type": "kmeans", "tile_rows": 1, "tile_cols": 1, "index_bits": 3},
    "kmeans-1x2-5": {"type": "kmeans", "tile_rows": 1, "tile_cols": 2, "index_bits": 5},
    "kmeans-4x1-6": {"type": "kmeans", "tile_rows": 4, "tile_cols": 1, "index_bits": 6},
    "kmeans-2x2-5": {"type": "kmeans", "tile_rows": 2, "tile_cols": 2, "index_bits": 5},
    "kmeans-1x8-9": {"type": "kmeans", "tile_cols": 8, "index_bits": 9, "iterations": 3},
    "grouped-kmeans-1x2-int8": {
        "type": "grouped_kmeans",
        "index_bits": 4,
        "group_rows": 8,
        "group_cols": 16,
    },
    "grouped-kmeans-2x2-float16": {
        "type": "grouped_kmeans",
        "tile_rows": 2,
        "index_bits": 5,
        "group_rows": 8,
        "group_cols": None,
        "fit": "once",
        "codebook": "float16",
    },
    "grouped-kmeans-1x1-svd": {
        "type": "grouped_kmeans",
        "tile_cols": 1,
        "index_bits": 3,
        "group_rows": 4,
        "group_cols": 32,
        "codebook": "svd",
    },
    "grouped-kmeans-1x4-scales": {
        "type": "grouped_kmeans",
        "tile_cols": 4,
        "index_bits": 5,
        "group_cols": 32,
        "scale_cols": 16,
    },
    "grouped-kmeans-3x1-scales": {
        "type": "grouped_kmeans",
        "tile_rows": 3,
        "tile_cols": 1,
        "index_bits": 6,
        "group_cols": 10,
        "scale_cols": 5,
        "codebook": "float16",
    },
    "grouped-1x1-2": {
        "type": "grouped",
        "tile_cols": 1,
        "index_bits": 2,
        "groups": 1,
        "rounds": 0,
        "passes": 2,
    },
    "grouped-1x2-5": {"type": "grouped", "tile_cols": 2, "index_bits": 5, "passes": 1},
    "grouped-1x8-3": {
        "type": "grouped",
        "tile_cols": 8,
        "index_bits": 3,
        "groups": 8,
        "rounds": 1,
        "neighbours": 3,
    },
    "convolutional-8": {"type": "convolutional", "group": 16, "maps": 2},
    "convolutional-10-cubic": {
        "type": "convolutional",
        "index_bits": 10,
        "shift": 4,
        "levels": "cubic",
        "group": None,
    },
    "convolutional-3x8": {
        "type": "convolutional",
        "tile_cols": 3,
        "window": 4,
        "shift": 2,
        "group": 9,
    },
    "e8p": {"type": "e8p"},
    "sparse-e8p": {"type": "sparse", "share": 0.02, "base": {"type": "e8p"}},
    "sparse-4x1": {
        "type": "sparse",
        "share": 0.05,
        "base": {"type": "kmeans", "tile_rows": 4, "tile_cols": 1, "index_bits": 6},
    },
    "sparse-residual": {
        "type": "sparse",
        "share": 0.1,
        "base": {"type": "residual", "stages": [{"type": "e8p"}, {"type": "e81b"}], "beam": 2},
    },
    "sparse-refitted": {
        "type": "sparse",
        "base": {
            "type": "grouped_kmeans",
            "index_bits": 4,
            "group_rows": 8,
            "group_cols": 16,
        },
    },
    "sparse-split": {
        "type": "sparse",
        "share": 0.03,
        "base": {
            "type": "split",
            "share": 0.1,
            "first": {"type": "uniform", "bits": 8, "group": None},
            "rest": {"type": "kmeans", "tile_rows": 4, "tile_cols": 1, "index_bits": 6},
        },
    },
    "split-sparse": {
        "type": "split",
        "share": 0.3,
        "first": {"type": "sparse", "share": 0.2, "base": {"type": "e8p"}},
        "rest": {"type": "e8p"},
    },
    "split-4x1-6x1": {
        "type": "split",
        "share": 0.1,
        "first": {"type": "kmeans", "tile_rows": 4, "tile_cols": 1, "index_bits": 6},
        "rest": {
            "type": "residual",
            "stages": [
                {"type": "kmeans", "tile_rows": 6, "tile_cols": 1, "index_bits": 5},
                {"type": "kmeans", "tile_rows": 6, "tile_cols": 1, "index_bits": 4},
            ],
            "beam": 2,
        },
    },
    "split-1x4-1x8": {
        "type": "split",
        "share": 0.4,
        "first": {"type": "grouped_kmeans", "tile_cols": 4, "group_cols": 8, "fit": "once"},
        "rest": {"type": "e8p"},
    },
    "split-1x8": {
        "type": "split",
        "share": 0.3,
        "first": {"type": "residual", "stages": [{"type": "e8p"}, {"type": "e81b"}], "beam": 2},
        "rest": {"type": "e8p"},
    },
    "e8p-0.9": {"type": "e8p", "scale_factor": 0.9},
    "e81b": {"type": "e81b"},
    "learned-lattice": {"type": "learned_lattice", "iterations": 2},
    "learned-lattice-16-2.5": {
        "type": "learned_lattice",
        "dim": 16,
        "bits": 2.5,
        "companding": "mu",
        "generator": "diagonal",
        "group": 192,
        "iterations": 1,
    },
    "learned-lattice-4-integers": {
        "type": "learned_lattice",
        "dim": 4,
        "bits": 2.25,
        "companding": "none",
        "group": None,
        "iterations": 3,
    },
    "learned-lattice-1": {
        "type": "learned_lattice",
        "dim": 1,
        "bits": 3,
        "group": 16,
        "iterations": 1,
    },
    "pyramid-5": {"type": "pyramid", "dim": 5, "bits": 2.4},
    "pyramid-32": {"type": "pyramid", "dim": 32, "pulses": 48, "levels": 5},
    "residual-3": {"type": "residual", "stages": [{"type": "e81b"}, {"type": "e8p"}]},
    "residual-4": {"type": "residual", "stages": [{"type": "e8p"}, {"type": "e8p"}], "beam": 3},
    "residual-greedy": {
        "type": "residual",
        "stages": [{"type": "e8p", "scale_factor": 0.9}, {"type": "e81b"}],
        "beam": 1,
    },
    "residual-kmeans": {
        "type": "residual",
        "stages": [
            {"type": "kmeans", "tile_cols": 4, "index_bits": 5},
            {"type": "kmeans", "tile_cols": 4, "index_bits": 3},
            {"type": "kmeans", "tile_cols": 4, "index_bits": 7},
        ],
        "beam": 2,
    },
    "additive-1x4-5": {
        "type": "additive",
        "tile_cols": 4,
        "index_bits": 5,
        "beam": 4,
        "iterations": 3,
        "rounds": 2,
    },
    "additive-2x1-3": {
        "type": "additive",
        "codebooks": 3,
        "tile_rows": 2,
        "tile_cols": 1,
        "index_bits": 3,
        "rounds": 2,
    },
    "residual-several-symbols": {
        "type": "residual",
        "stages": [
            {"type": "pyramid", "dim": 8, "bits": 3},
            {"type": "learned_lattice", "dim": 8, "bits": 1},
            {"type": "e81b"},
        ],
    },
    "residual-uniform": {
        "type": "residual",
        "stages": [
            {"type": "uniform", "bits": 2, "group": 16},
            {"type": "uniform", "bits": 3, "group": None},
        ],
    },
}
CONFIGURATIONS = {
    f"{name}-{i}": {"type": name, **point.options}
    for name in CODECS
    for i, point in enumerate(CODECS.get(name).points)
    if point.quick
} | EXTRA
SHAPES = [(5, 37), (37, 43), (64, 576)]
MORE_SHAPES = [pytest.param(shape, marks=pytest.mark.slow) for shape in ((16, 24), (1, 8))]


def build(name):
    values = CONFIGURATIONS[name]
    return CODECS.get(values["type"]).model_validate(values)


def each_configuration_that(fits):
    return pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if fits(build(name))])


each_configuration = pytest.mark.parametrize("name", CONFIGURATIONS)
each_shape = pytest.mark.parametrize(
    "shape", [*SHAPES, *MORE_SHAPES], ids=lambda shape: f"{shape[0]}x{shape[1]}"
)


def generator(seed=7):
    return torch.Generator().manual_seed(seed)


def matrix(shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def fit(name, shape):
    """A codec, the tiles of a matrix, the state and the codes."""
    codec = build(name)
    X_IJE = tiles.to_tiles(matrix(shape), codec.tile)
    state = codec.fit(X_IJE, None, generator())
    return codec, X_IJE, state, codec.encode(X_IJE, state)


fitted = functools.cache(fit)
"""The same, once for a name and a shape: tests leave what they get as it is."""


def errors(codec, X_IJE, codes_IJM, state):
    return ((codec.decode(codes_IJM, state) - X_IJE) ** 2).sum(2)


def same(a, b):
    return set(a) == set(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_every_registered_codec_is_here():
    assert {values["type"] for values in CONFIGURATIONS.values()} == set(CODECS)


@each_shape
@each_configuration
def test_codes_and_reproductions_have_the_declared_form(name, shape):
    codec, X_IJE, state, codes_IJM = fitted(name, shape)
    assert codes_IJM.dtype == torch.int32
    assert codes_IJM.shape[:2] == tiles.grid(*shape, codec.tile) == codec.spec().grid(*shape)
    assert codes_IJM.shape[2] == codec.num_symbols
    decoded = codec.decode(codes_IJM, state)
    assert decoded.dtype == torch.float32
    assert decoded.shape == X_IJE.shape
    assert bool(decoded.isfinite().all())


@each_shape
@each_configuration
def test_decoded_weights_are_coded_without_further_loss(name, shape):
    codec, _, state, codes_IJM = fitted(name, shape)
    decoded = codec.decode(codes_IJM, state)
    again = codec.decode(codec.encode(decoded, state), state)
    if not codec.exact:
        # A bounded search does not always find the code again; then it finds one close to it.
        assert (again - decoded).square().mean() < 0.01 * decoded.square().mean()
    else:
        assert torch.equal(again, decoded)


@each_shape
@each_configuration
def test_packing_is_lossless(name, shape):
    codec, _, state, codes_IJM = fitted(name, shape)
    codes, unpacked_state = codec.unpack(codec.pack(codes_IJM, state), *shape)
    assert codes.dtype == torch.int32
    assert torch.equal(codes, codes_IJM)
    assert same(unpacked_state, state)


@each_shape
@each_configuration
def test_packed_tensors_are_those_of_the_format(name, shape):
    codec, _, state, codes_IJM = fitted(name, shape)
    packed = codec.pack(codes_IJM, state)
    layout.check(packed, codec.spec().layout(*shape), name)
    num_bytes = sum(t.numel() * t.element_size() for t in packed.values())
    assert codec.bits(*shape).total == 8 * num_bytes
    codes = [t for k, t in packed.items() if "codes" in k or "outlier" in k]
    codes_bytes = sum(t.numel() * t.element_size() for t in codes)
    assert codec.bits(*shape).codes == 8 * codes_bytes


@each_shape
@each_configuration
def test_format_decodes_what_the_codec_decodes(name, shape):
    codec, _, state, codes_IJM = fitted(name, shape)
    W_RC = tiles.from_tiles(codec.decode(codes_IJM, state), codec.tile, *shape)
    from_format = codec.spec().decode(codec.pack(codes_IJM, state), *shape)
    assert from_format.dtype == torch.float32
    assert torch.equal(from_format, W_RC)


@each_shape
@each_configuration
def test_packed_tensors_have_no_problem_unless_not_finite(name, shape):
    codec, _, state, codes_IJM = fitted(name, shape)
    packed, spec = codec.pack(codes_IJM, state), codec.spec()
    assert spec.problem(packed, *shape) is None
    if shape == SHAPES[0]:
        for key, tensor in packed.items():
            if tensor.is_floating_point():
                broken = tensor.clone()
                broken.flatten()[-1] = torch.nan
                problem = spec.problem({**packed, key: broken}, *shape)
                assert problem is not None
                assert "are NaN or infinite" in problem


@each_shape
@each_configuration
def test_rows_can_be_decoded_alone(name, shape):
    codec, _, state, codes_IJM = fitted(name, shape)
    packed = codec.pack(codes_IJM, state)
    whole_RC = codec.spec().decode(packed, *shape)
    index_N = torch.tensor([shape[0] - 1, 0, shape[0] // 2, 0])
    assert torch.equal(codec.spec().decode_rows(packed, index_N, shape[1]), whole_RC[index_N])


@each_configuration
def test_format_survives_json(name):
    spec = build(name).spec()
    assert formats.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.format_id in formats.known_formats()
    assert spec.format_id == build(name).format_id


@each_configuration
def test_options_survive_json(name):
    codec = build(name)
    values = json.loads(codec.model_dump_json())
    assert values["type"] == CONFIGURATIONS[name]["type"]
    assert type(codec).model_validate(values) == codec
    assert {**values, **CONFIGURATIONS[name]}.keys() == values.keys()


@each_configuration
def test_unknown_option_is_refused(name):
    with pytest.raises(ValidationError, match="no_such_option"):
        CODECS.get(CONFIGURATIONS[name]["type"]).model_validate(
            {**CONFIGURATIONS[name], "no_such_option": 1}
        )


@each_shape
@each_configuration
def test_same_generator_same_result(name, shape):
    _, _, state, codes_IJM = fitted(name, shape)
    _, _, state_again, codes_again = fit(name, shape)
    assert same(state, state_again)
    assert torch.equal(codes_IJM, codes_again)


@each_configuration
def test_same_result_with_more_threads(name):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        _, _, state, codes_IJM = fit(name, (64, 576))
        torch.set_num_threads(3)
        _, _, state_again, codes_again = fit(name, (64, 576))
    finally:
        torch.set_num_threads(threads)
    assert same(state, state_again)
    assert torch.equal(codes_IJM, codes_again)


@each_configuration
def test_inputs_are_not_changed(name):
    codec = build(name)
    X_IJE = tiles.to_tiles(matrix((16, 24)), codec.tile)
    before = X_IJE.clone()
    state = codec.fit(X_IJE, None, generator())
    state_before = {k: v.clone() for k, v in state.items()}
    codes_IJM = codec.encode(X_IJE, state)
    codec.decode(codes_IJM, state)
    codec.pack(codes_IJM, state)
    assert torch.equal(X_IJE, before)
    assert same(state, state_before)


@each_configuration
def test_stripes_of_columns_code_like_the_whole(name):
    codec, X_IJE, state, codes_IJM = fitted(name, (16, 576))
    num_cols = X_IJE.shape[1]
    for first, last in ((0, 1), (3, 11), (num_cols - 5, num_cols)):
        stripe = codec.encode(X_IJE[:, first:last], state, col=first)
        assert torch.equal(stripe, codes_IJM[:, first:last])
        decoded = codec.decode(stripe, state, col=first)
        assert torch.equal(decoded, codec.decode(codes_IJM, state)[:, first:last])


@each_configuration
def test_no_other_code_is_nearer(name):
    codec, X_IJE, state, codes_IJM = fitted(name, (37, 43))
    best = errors(codec, X_IJE, codes_IJM, state)
    for seed in range(8):
        # Codes of other tiles of the same row are valid codes, and so are those of moved weights.
        order = torch.randperm(X_IJE.shape[1], generator=generator(seed))
        nearby = X_IJE + 0.3 * torch.randn(X_IJE.shape, generator=generator(seed))
        for other in (codes_IJM[:, order], codec.encode(nearby, state)):
            error = errors(codec, X_IJE, other, state)
            if not codec.exact:
                assert float(error.mean()) >= float(best.mean())
            else:
                assert bool((error >= best - 1e-5).all())


@each_configuration_that(lambda codec: isinstance(codec, SearchableCodec))
def test_candidates_are_ordered_and_begin_with_the_nearest(name):
    codec, X_IJE, state, codes_IJM = fitted(name, (16, 24))
    codes_IJK = codec.candidates(X_IJE, state, 4)
    assert codes_IJK.shape == (*X_IJE.shape[:2], 4)
    error = torch.stack(
        [errors(codec, X_IJE, codes_IJK[..., k : k + 1], state) for k in range(4)], -1
    )
    torch.testing.assert_close(error[..., 0], errors(codec, X_IJE, codes_IJM, state))
    repeated = codes_IJK == codes_IJK[..., :1]
    assert bool(((error.diff(dim=-1) >= -1e-4) | repeated[..., 1:]).all())


@each_configuration_that(lambda codec: codec.lists_codes)
def test_shortlists_begin_with_the_code(name):
    codec, X_IJE, state, codes_IJM = fitted(name, (16, 24))
    num_elements = X_IJE.shape[2]
    factor_EE = torch.randn(num_elements, num_elements, generator=generator(2))
    weights = [None]
    if codec.weighted and num_elements > 1:
        weights.append(factor_EE @ factor_EE.T + 0.1 * torch.eye(num_elements))

    def error(codes, weight_EE):
        gap_IJE = codec.decode(codes, state) - X_IJE
        weighted_IJE = gap_IJE if weight_EE is None else gap_IJE @ weight_EE
        error_IJ = (weighted_IJE * gap_IJE).sum(2)
        return error_IJ if codec.exact else error_IJ.mean()

    for weight_EE in weights:
        best = error(codec.encode(X_IJE, state, weight_E=weight_EE), weight_EE)
        for num in (1, 4):
            codes_IJKM = codec.shortlist(X_IJE, state, num, weight_EE)
            assert codes_IJKM.dtype == torch.int32
            assert 1 <= codes_IJKM.shape[2] <= num
            assert codes_IJKM[:, :, 0].shape == codes_IJM.shape
            first = error(codes_IJKM[:, :, 0], weight_EE)
            assert bool((first <= 1.001 * best + 1e-5).all())
            moved = codec.shortlist(X_IJE.transpose(0, 1), state, num, weight_EE)
            assert torch.equal(moved.transpose(0, 1), codes_IJKM), "its place does not matter"


@pytest.mark.parametrize("kind", ["elements", "spike", "dense"])
@each_configuration_that(lambda codec: codec.weighted and codec.tile != (1, 1))
def test_weighted_coding_lowers_the_weighted_error(name, kind):
    codec, X_IJE, state, codes_IJM = fitted(name, (64, 576))
    num_elements = X_IJE.shape[2]
    weight_E = torch.logspace(-1, 1, num_elements)
    direction_E = torch.randn(num_elements, generator=generator(1))
    factor_EE = torch.randn(num_elements, num_elements, generator=generator(2))
    weight = {
        "elements": weight_E,
        "spike": torch.eye(num_elements) + 10 * torch.outer(direction_E, direction_E),
        "dense": factor_EE @ factor_EE.T + 0.1 * torch.eye(num_elements),
    }[kind]
    weight_EE = torch.diag(weight) if weight.dim() == 1 else weight

    def error(codes):
        gap_IJE = codec.decode(codes, state) - X_IJE
        return float(((gap_IJE @ weight_EE) * gap_IJE).mean())

    assert error(codec.encode(X_IJE, state, weight_E=weight)) < 0.95 * error(codes_IJM)


@each_configuration
def test_equal_weights_are_no_weights(name):
    codec, X_IJE, state, codes_IJM = fitted(name, (64, 576))
    plain = float(errors(codec, X_IJE, codes_IJM, state).mean())
    for weight in (3 * torch.ones(X_IJE.shape[2]), 3 * torch.eye(X_IJE.shape[2])):
        weighted = codec.encode(X_IJE, state, weight_E=weight)
        error = float(errors(codec, X_IJE, weighted, state).mean())
        assert error == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@each_configuration
def test_non_finite_weights_are_refused(name, bad):
    codec, X_IJE, state, _ = fitted(name, (16, 24))
    broken = X_IJE.clone()
    broken[-1, -1, 0] = bad
    with pytest.raises(NumericalError, match=r"1 of .* weights are NaN or infinite"):
        codec.fit(broken, None, generator())
    with pytest.raises(NumericalError, match=r"1 of .* weights are NaN or infinite"):
        codec.encode(broken, state)


@each_configuration
def test_decode_is_differentiable_in_the_state(name):
    codec, _, state, codes_IJM = fitted(name, (16, 24))
    learned = {k: v.clone().requires_grad_() for k, v in state.items() if v.is_floating_point()}
    codec.decode(codes_IJM, {**state, **learned}).square().sum().backward()
    for name_, tensor in learned.items():
        assert tensor.grad is not None, name_
        assert float(tensor.grad.abs().sum()) > 0, name_


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "0 stages; needed are two or more"),
        ([{"type": "e8p"}], "1 stages; needed are two or more"),
        ([{"type": "e8p"}, {"type": "uniform"}], r"tiles \[\(1, 8\), \(1, 1\)\]"),
        ([{"type": "e8p"}, {"type": "e8q"}], "unknown codec 'e8q'. Did you mean 'e81b'|'e8p'"),
        ([{"type": "e8p"}, {"scale_factor": 1}], "has no `type`"),
        ("e8p", "needed is a list of codecs"),
        (
            [CONFIGURATIONS["residual-3"], CONFIGURATIONS["residual-4"]],
            "a stage is itself residual",
        ),
    ],
)
def test_residual_stages_that_do_not_fit(stages, message):
    with pytest.raises(RecipeError, match=message):
        CODECS.get("residual").model_validate({"type": "residual", "stages": stages})


def test_residual_beam_needs_searchable_stages():
    uniform = {"type": "uniform"}
    with pytest.raises(RecipeError, match="beam 4 with uniform, uniform"):
        CODECS.get("residual").model_validate(
            {"type": "residual", "stages": [uniform, uniform], "beam": 4}
        )
