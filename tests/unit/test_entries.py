"""Tables whose entries all differ: the writers' side and the readers'."""

import pytest
import torch

from tests.support.gaussian import fitted, gaussian
from vqllm import recipes
from vqllm.codecs import CODECS
from vqllm.codecs.entries import apart, distinct
from vqllm.core.protocols import JSON
from vqllm_kernels.tables import FINITE, equal_entries, repeated

TABLES: list[JSON] = [
    {"type": "kmeans", "tile_cols": 2, "index_bits": 6},
    {"type": "grouped", "tile_cols": 4, "index_bits": 6, "groups": 2},
    {
        "type": "grouped_kmeans",
        "tile_cols": 2,
        "index_bits": 6,
        "group_cols": 32,
        "codebook": "float16",
    },
]
"""Codecs with a tensor `codebook` of entries."""
ADDITIVE: JSON = {"type": "additive", "tile_cols": 4, "index_bits": 6, "codebooks": 2}


def test_repeated_entries_are_those_after_the_first_of_their_own_table() -> None:
    table = torch.tensor([[1.0, 2], [0, 1], [1, 2], [-0.0, 1], [2, 1], [1, 2]]).half()
    assert repeated(table).tolist() == [False, False, True, True, False, True]
    both = torch.stack([table, torch.arange(12).view(6, 2).half()])
    assert repeated(both).tolist() == [repeated(table).tolist(), [False] * 6]
    assert equal_entries("codebook", both) == (
        "3 of the 12 entries of codebook equal an earlier one"
    )


@pytest.mark.parametrize(
    "shape",
    [(256, 1), (4, 64, 2), (4096, 8), (1 << 16, 2)],
    ids=lambda shape: "x".join(map(str, shape)),
)
@pytest.mark.parametrize("values", [0, 1, 9])
def test_distinct_tables_keep_their_first_entries(shape: tuple[int, ...], values: int) -> None:
    kinds = gaussian(max(values, 1), shape[-1]).half() * (values > 0)
    pick = torch.randint(len(kinds), shape[:-1], generator=torch.Generator().manual_seed(1))
    table = kinds[pick]
    again = repeated(table)
    made = distinct(table)
    assert not repeated(made).any()
    assert made.isfinite().all()
    assert torch.equal(made[~again], table[~again])
    assert torch.equal(distinct(made), made)
    assert distinct(made) is made
    if shape[-2] < 1 << 14:  # beyond all others, so that they are near to nothing
        assert made[again][:, 0].min() > table[..., 0].abs().max()


@pytest.mark.parametrize("size", [1, 4])
def test_entries_that_came_to_be_equal_stay_near(size: int) -> None:
    table = 0.05 * gaussian(256, size)
    table[100:200] = table[:100]
    again = repeated(table.half())
    made = apart(table.half())
    assert not repeated(made).any()
    assert torch.equal(made[~again], table.half()[~again])
    assert float((made - table).abs().max()) < 1e-3
    assert apart(made) is made
    assert torch.equal(apart(torch.zeros(3, 1).half())[0], torch.zeros(1).half())


def test_a_trained_codebook_is_stored_as_it_was_trained() -> None:
    codec = CODECS.get("kmeans").model_validate({"type": "kmeans", "tile_cols": 1, "index_bits": 8})
    table = 0.05 * gaussian(256, 1)
    assert repeated(table.half()).any()
    stored = codec.project({"codebook": table})["codebook"]
    assert equal_entries("codebook", stored) is None
    assert float((stored - table).abs().max()) < 1e-3


def test_a_table_of_the_largest_numbers_has_room_below() -> None:
    table = torch.full((300, 1), torch.finfo(torch.float16).max).half()
    made = distinct(table)
    assert made.isfinite().all()
    assert not repeated(made).any()


def test_more_scalars_than_there_are_numbers_cannot_differ() -> None:
    table = torch.zeros(1 << 16, 1).half()
    assert len(table) > FINITE
    assert equal_entries("codebook", distinct(table)) is None


@pytest.mark.parametrize("options", [*TABLES, ADDITIVE], ids=lambda options: options["type"])
@pytest.mark.parametrize("weights", ["zero", "few values", "few rows", "tuned"])
def test_what_codecs_store_can_be_read(options: JSON, weights: str) -> None:
    values = {"name": "x", "codec": options, "rounding": {"type": "nearest"}}
    codec = recipes.from_dict(values, "x").codec
    W = {
        "zero": torch.zeros(16, 64),
        "few values": gaussian(16, 64).round(),
        "few rows": gaussian(2, 64),
        "tuned": gaussian(16, 64),
    }[weights]
    _, state, codes = fitted(codec, W)
    if weights == "tuned":  # steps that make all entries one, and what can be stored of that
        state = codec.project({k: v * 0.0 if "codebook" in k else v for k, v in state.items()})
    assert codec.spec().problem(codec.pack(codes, state), *W.shape) is None


@pytest.mark.parametrize("options", TABLES, ids=lambda options: options["type"])
def test_readers_refuse_equal_entries(options: JSON) -> None:
    values = {"name": "x", "codec": options, "rounding": {"type": "nearest"}}
    codec = recipes.from_dict(values, "x").codec
    W = gaussian(16, 64)
    _, state, codes = fitted(codec, W)
    tensors = codec.pack(codes, state)
    table = tensors["codebook"].clone()
    table[..., 3, :] = table[..., 5, :]
    problem = codec.spec().problem({**tensors, "codebook": table}, *W.shape)
    assert problem is not None
    assert "entries of codebook equal an earlier one" in problem
