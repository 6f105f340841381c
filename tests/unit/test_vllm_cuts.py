"""What a process holds of a linear under tensor parallelism is that part of its dense weights."""

import pytest
import torch
from torch import Tensor

from tests.support.fake_checkpoint import FORMATS, linear_spec, random_packed
from vqllm.errors import ModelError
from vqllm.integrations.vllm import cuts
from vqllm_kernels import slices
from vqllm_kernels.e8p.spec import E8PSpec
from vqllm_kernels.formats import FormatSpec
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.residual.spec import ResidualSpec
from vqllm_kernels.transforms import (
    BlockDiagonalSpec,
    CodedScaleSpec,
    HadamardSpec,
    PermutationSpec,
    ScaleSpec,
)
from vqllm_kernels.trellis.spec import TrellisSpec

ROWS, COLS = 128, 256
TRELLIS = TrellisSpec(
    code="mul1", state_bits=8, step_weights=1, table_bits=0, tile_bits=512, tile_rows=16
)
GRIDS: dict[str, FormatSpec] = {
    "e8p": E8PSpec(),
    "residual": ResidualSpec(stages=(E8PSpec(), E8PSpec())),
    "trellis": TRELLIS,
}
"""Formats whose tensors have an axis of tiles of a row."""


def spec_of(format: FormatSpec, block: int | None = 32) -> LinearSpec:
    """With transforms on both sides that end every `block` features."""
    return LinearSpec(
        rows=ROWS,
        cols=COLS,
        format=format,
        transforms=(
            ScaleSpec(side="in", size=COLS),
            HadamardSpec(side="in", size=COLS, block=block),
            HadamardSpec(side="out", size=ROWS, block=block),
            CodedScaleSpec(side="out", size=ROWS, bits=3),
        ),
    )


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", [*GRIDS.values(), FORMATS["uniform"]], ids=[*GRIDS, "uniform"])
@pytest.mark.parametrize("own", [(0, 64), (32, 96), (96, 128)])
def test_some_rows(format: FormatSpec, own: slices.Range) -> None:
    spec = spec_of(format)
    tensors = random_packed(spec)
    assert slices.ends_of_rows(spec, own)
    cut, held = slices.rows_of(spec, tensors, own)
    assert {name: t.shape for name, t in held.items()} == {
        name: t.shape for name, t in cut.layout().items()
    }
    close(cut.dequantize(held), spec.dequantize(tensors)[own[0] : own[1]])


@pytest.mark.parametrize("format", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("own", [(0, 128), (64, 192), (224, 256)])
def test_some_columns(format: FormatSpec, own: slices.Range) -> None:
    spec = spec_of(format)
    tensors = random_packed(spec)
    assert slices.ends_of_columns(spec, own)
    cut, held = slices.columns_of(spec, tensors, own)
    assert {name: t.shape for name, t in held.items()} == {
        name: t.shape for name, t in cut.layout().items()
    }
    close(cut.dequantize(held), spec.dequantize(tensors)[:, own[0] : own[1]])


@pytest.mark.parametrize("format", GRIDS.values(), ids=GRIDS)
def test_shares_of_rows_of_the_other_basis(format: FormatSpec) -> None:
    spec = spec_of(format, block=None)
    tensors = random_packed(spec)
    assert not slices.ends_of_rows(spec, (0, 64))
    assert not slices.ends_of_columns(spec, (0, 128))
    shares = [cuts.share_of(spec, tensors, rank, 2) for rank in range(2)]
    y = torch.cat([cut.dequantize(held) for cut, held in shares])  # before the output's transforms
    _, states = spec.split(tensors)
    for transform, state in reversed(list(zip(spec.transforms, states))):
        if transform.side == "out":
            y = transform.inverse(y, state)
    close(y, spec.dequantize(tensors))


@pytest.mark.parametrize("own", [(0, 48), (48, 96), (96, 128), (64, 128)])
def test_dense_blocks_of_transforms(own: slices.Range) -> None:
    block = 48 if own[0] % 48 == 0 else 64
    transform = BlockDiagonalSpec(side="in", size=128, block=block)
    spec = LinearSpec(rows=16, cols=128, format=E8PSpec(), transforms=(transform,))
    tensors = random_packed(spec)
    assert slices.ends_of_columns(spec, own)
    assert not slices.ends_of_columns(spec, (0, 16))
    cut, held = slices.columns_of(spec, tensors, own)
    assert {name: t.shape for name, t in held.items()} == {
        name: t.shape for name, t in cut.layout().items()
    }
    close(cut.dequantize(held), spec.dequantize(tensors)[:, own[0] : own[1]])


def test_what_cannot_be_cut() -> None:
    spec = spec_of(TRELLIS)
    assert not slices.ends_of_rows(spec, (0, 40)), "tiles of 16 rows"
    assert not slices.ends_of_rows(spec, (0, 16)), "blocks of 32 rows"
    assert not slices.ends_of_columns(spec_of(FORMATS["uniform"]), (0, 128)), "packed along a row"
    permuted = LinearSpec(
        rows=ROWS, cols=COLS, format=E8PSpec(), transforms=(PermutationSpec(side="in", size=COLS),)
    )
    assert not slices.ends_of_columns(permuted, (0, 128))
    assert slices.ends_of_rows(permuted, (3, 100))
    assert not slices.ends_of_rows(linear_spec(E8PSpec(), ROWS, COLS), (0, 64)), (
        "blocks of the output"
    )


def test_whole_linears_are_left_as_they_are() -> None:
    spec = spec_of(TRELLIS, block=None)
    tensors = random_packed(spec)
    assert slices.ends_of_rows(spec, (0, ROWS))
    assert slices.rows_of(spec, tensors, (0, ROWS)) == (spec, tensors)
    assert slices.columns_of(spec, tensors, (0, COLS)) == (spec, tensors)


def test_what_would_divide_is_said() -> None:
    cuts.check_divides("q", spec_of(TRELLIS), 4)
    with pytest.raises(ModelError, match="128 rows in tiles of 16") as raised:
        cuts.check_divides("model.layers.0.self_attn.q_proj", spec_of(TRELLIS), 3)
    assert "1, 2, 4, 8 would" in str(raised.value)
    assert "tensor parallelism of 3: model.layers.0.self_attn.q_proj" in str(raised.value)
    assert '{"vqllm_weights": "decoded"}' in str(raised.value)


def test_rows_of_fused_parts() -> None:
    pieces = [cuts.Piece(64), cuts.Piece(32, replicas=2), cuts.Piece(32, replicas=2)]
    assert cuts.own_rows([64, 32, 32], pieces, 0, 2) == [[(0, 32)], [(0, 32)], [(0, 32)]]
    assert cuts.own_rows([64, 32, 32], pieces, 3, 4) == [[(48, 64)], [(16, 32)], [(16, 32)]]
    # Stored as one matrix, as Phi-3's are.
    assert cuts.own_rows([128], pieces, 1, 2) == [[(32, 64), (64, 96), (96, 128)]]
    assert cuts.own_rows([64, 64], pieces, 0, 2) is None


def test_dense_rows() -> None:
    W_RC = torch.arange(12.0).view(6, 2)
    assert torch.equal(cuts.dense_rows(W_RC, [(1, 3)]), W_RC[1:3])
    assert torch.equal(cuts.dense_rows(W_RC, [(0, 1), (4, 6)]), W_RC[[0, 4, 5]])
