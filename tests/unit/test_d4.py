"""The D4 codebook and the search in it."""

import itertools

import pytest
import torch

from vqllm.codecs import CODECS
from vqllm.core.tiles import to_tiles
from vqllm_kernels import formats, layout
from vqllm_kernels.d4 import reference

TABLE = reference.codeword_table(torch.device("cpu"))


def gaussian(num, seed=0):
    return torch.randn(num, 4, generator=torch.Generator().manual_seed(seed))


def fitted(X_IJE, **options):
    codec = CODECS.get("d4").model_validate({"type": "d4", **options})
    return codec, codec.fit(X_IJE, None, torch.Generator())


def test_codewords_are_all_points_of_the_ball():
    halves = [i / 2 for i in range(-9, 10, 2)]
    ball = [
        v
        for v in itertools.product(halves, repeat=4)
        if sum(v) % 2 == 0 and sum(c * c for c in v) <= 9
    ]
    assert len(ball) == 256
    assert {tuple(row) for row in TABLE.tolist()} == set(ball)


def test_shells_of_the_codebook():
    num_by_norm = (TABLE**2).sum(1).int().bincount()
    assert num_by_norm.tolist() == [0, 8, 0, 32, 0, 48, 0, 64, 0, 104]


def test_the_bits_of_a_code():
    table = reference.abs_table().tolist()
    assert table[0] == [1, 1, 1, 1]
    assert table[1] == [1, 1, 1, 3]
    for code in range(256):
        word = [magnitude / 2 for magnitude in table[code >> 3]]
        for i in (1, 2, 3):
            if code >> (i - 1) & 1:
                word[i] = -word[i]
        if sum(word) % 2:
            word[0] = -word[0]
        assert TABLE[code].tolist() == word


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_search_equals_brute_force(size):
    X_IJE = size * gaussian(500).reshape(5, 100, 4)
    codec, state = fitted(X_IJE, scale_factor=0.9)
    points = TABLE.double() * state["scale"]
    ideal = (X_IJE.double()[:, :, None] - points).square().sum(-1).amin(-1)
    gap = codec.decode(codec.encode(X_IJE, state), state).double() - X_IJE.double()
    torch.testing.assert_close(gap.square().sum(-1), ideal, rtol=1e-5, atol=0)


def test_weighted_search_equals_brute_force():
    X_IJE = gaussian(300).reshape(3, 100, 4)
    codec, state = fitted(X_IJE)
    factor = gaussian(4, seed=1)
    weight = factor.T @ factor + 0.1 * torch.eye(4)
    gaps = X_IJE[:, :, None] - TABLE * state["scale"]
    ideal = ((gaps @ weight) * gaps).sum(-1).amin(-1)
    gap = codec.decode(codec.encode(X_IJE, state, weight_E=weight), state) - X_IJE
    torch.testing.assert_close(((gap @ weight) * gap).sum(-1), ideal, rtol=1e-4, atol=1e-5)


def test_every_codeword_finds_itself():
    state = {"scale": torch.ones(1)}
    codes = CODECS.get("d4")().encode(TABLE[None], state)
    assert torch.equal(codes[0, :, 0], torch.arange(256, dtype=torch.int32))


def test_the_scale_is_optimal():
    X_IJE = to_tiles(torch.randn(64, 4096, generator=torch.Generator().manual_seed(5)), (1, 4))

    def distortion(factor):
        codec, state = fitted(X_IJE, scale_factor=factor)
        return float((codec.decode(codec.encode(X_IJE, state), state) - X_IJE).square().mean())

    assert distortion(1.0) < min(distortion(0.96), distortion(1.04))


def test_zero_weights_decode_to_nearly_zero():
    X_IJE = torch.zeros(3, 2, 4)
    codec, state = fitted(X_IJE)
    assert float(codec.decode(codec.encode(X_IJE, state), state).abs().max()) < 1e-29


def test_the_format_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"d4-v1: fields \['bits'\], expected \[\]"):
        formats.from_dict({"format": "d4-v1", "bits": 2})


def test_tensors_of_another_shape_or_dtype_are_refused():
    codec, state = fitted(gaussian(8).reshape(2, 4, 4))
    packed = codec.pack(torch.zeros(2, 4, 1, dtype=torch.int32), state)
    wanted = codec.spec().layout(2, 14)
    layout.check(packed, wanted, "whole")
    for damaged in (packed["codes"][:, :3], packed["codes"].to(torch.int16)):
        with pytest.raises(ValueError, match="damaged: codes is"):
            layout.check({**packed, "codes": damaged}, wanted, "damaged")
