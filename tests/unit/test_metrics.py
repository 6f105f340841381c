"""Entropies of codes with known distributions."""

import math

import pytest
import torch

from vqllm.codecs import CODECS
from vqllm.core import metrics


def symbols(probabilities, num, values=None):
    """[num, 1, 1] codes in exactly these proportions."""
    counts = [round(p * num) for p in probabilities]
    values = range(len(counts)) if values is None else values
    return torch.cat([torch.full((n, 1, 1), v) for n, v in zip(counts, values)]).to(torch.int32)


@pytest.mark.parametrize(
    ("probabilities", "values"),
    [([0.5, 0.5], None), ([0.5, 0.25, 0.125, 0.125], None), ([0.5, 0.5], [0, 257])],
)
def test_entropy_is_that_of_the_frequencies(probabilities, values):
    entropy = -sum(p * math.log2(p) for p in probabilities)
    codes_IJM = symbols(probabilities, 1 << 14, values)
    assert metrics.code_entropy(codes_IJM) == pytest.approx(entropy * (1 << 14))


def test_symbols_that_are_all_the_same_need_nothing():
    assert metrics.code_entropy(symbols([1.0], 1 << 10, [37])) == 0
    assert metrics.code_entropy(torch.zeros(0, 4, 2, dtype=torch.int32)) == 0


def test_few_symbols_of_many_bits_are_not_mistaken_for_a_code():
    # 2^12 different symbols of 16 bits: counted whole, they would seem to need 12 bits each.
    generator = torch.Generator().manual_seed(0)
    codes_IJM = torch.randint(1 << 16, (1 << 12, 1, 1), generator=generator, dtype=torch.int32)
    assert 15.9 < metrics.code_entropy(codes_IJM) / (1 << 12) < 16


def test_symbols_of_a_tile_are_counted_one_by_one():
    codes_IJM = torch.cat((symbols([0.5, 0.5], 64), symbols([1.0], 64)), 2)
    assert metrics.code_entropy(codes_IJM) == pytest.approx(64)


def test_padding_and_parts_of_split_codes_stay_apart():
    codec = CODECS.get("split").model_validate(
        {
            "type": "split",
            "share": 0.25,
            "first": {"type": "kmeans", "tile_rows": 2, "tile_cols": 1, "index_bits": 4},
            "rest": {"type": "kmeans", "tile_rows": 4, "tile_cols": 1, "index_bits": 4},
        }
    )
    X_IJE = torch.randn(8, 8, 4, generator=torch.Generator().manual_seed(0))
    codes_IJM = codec.encode(X_IJE, codec.fit(X_IJE, None, torch.Generator()))
    assert codes_IJM.shape == (8, 8, 2)
    assert [tuple(s.shape) for s in codec.streams(codes_IJM)] == [(16, 2, 1), (8, 6, 1)]
