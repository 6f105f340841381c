"""Types whose codes are vectors: rows that are hard for them, the nearest code, a missing grid."""

import gguf
import pytest
import torch
from torch import Tensor

from vqllm.errors import ModelError
from vqllm.export import grids
from vqllm.export.native_rounding import round_matrix, round_to_nearest
from vqllm.export.native_types import TYPES, NativeType

VECTORS = {name: own for name, own in TYPES.items() if own.grid is not None}


def every_code(native: NativeType) -> Tensor:
    """What all codes of a tile mean, [codes, tile]."""
    grid_NW = grids.vectors_of(native)
    while grid_NW.shape[1] < native.tile_cols:
        left, right = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
        grid_NW = torch.cat([grid_NW[left.flatten()], grid_NW[right.flatten()]], 1)
    bits = torch.arange(1 << native.tile_cols)[:, None] >> torch.arange(native.tile_cols)
    signs = 1.0 - 2.0 * (bits & 1)
    assert native.grid is not None
    if native.grid.parity:
        signs = signs[signs.prod(1) > 0]
    return (grid_NW[:, None] * signs).flatten(0, 1)


@pytest.mark.parametrize("name", VECTORS)
def test_rows_at_the_limits(name: str) -> None:
    """Zeros, constants, one huge weight, tiny ones: gguf decodes what we say, all of it finite."""
    W_RC = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)) * 0.05
    W_RC[0] = 0
    W_RC[1] = 0.05
    W_RC[2] = -0.05
    W_RC[3, 77] = 3e4
    W_RC[4] *= 1e-6
    W_RC[5, :64] = 0
    W_RC[6] *= 1e7
    for matrix in (
        round_to_nearest(TYPES[name], W_RC),
        round_matrix(TYPES[name], W_RC, torch.eye(256)),
    ):
        number = gguf.GGMLQuantizationType[name]
        decoded_RC = torch.from_numpy(gguf.dequantize(matrix.blocks_RB.numpy(), number))
        assert bool(decoded_RC.isfinite().all())
        assert torch.equal(decoded_RC, matrix.W_hat_RC)
        assert not bool(decoded_RC[0].any())
        assert (decoded_RC[1] - W_RC[1]).square().mean() < 0.5 * W_RC[1].square().mean()


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_S", "IQ3_S"])
@pytest.mark.parametrize("whole", [False, True], ids=["diagonal", "matrix"])
def test_codes_are_near_the_nearest(name: str, whole: bool) -> None:
    native = VECTORS[name]
    generator = torch.Generator().manual_seed(0)
    values = every_code(native)
    ratio_TE = (
        torch.randn(64, native.tile_cols, generator=generator) * values.square().mean() ** 0.5
    )
    x_NE = torch.randn(64, native.tile_cols, generator=generator)
    D_EE = x_NE.T @ x_NE / 64
    weight_TE = torch.diagonal(D_EE).expand(ratio_TE.shape)
    if not whole:
        D_EE = torch.diag(torch.diagonal(D_EE))
    codes_TM = grids.nearest(native, ratio_TE, weight_TE, D_EE if whole else None)
    found_TE = grids.reproduced(native, codes_TM)

    def loss(gap: Tensor) -> Tensor:
        return ((gap @ D_EE) * gap).sum(1)

    least_T = torch.stack([loss(row_E - values).min() for row_E in ratio_TE])
    assert bool((loss(ratio_TE - found_TE) >= least_T * 0.9999).all())
    assert loss(ratio_TE - found_TE).sum() < 1.05 * least_T.sum()


def test_a_chunk_has_no_part_in_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    native = VECTORS["IQ3_XXS"]
    ratio_TE = 20 * torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    weight_TE = 1 + torch.arange(320.0).view(40, 8)
    whole = grids.nearest(native, ratio_TE, weight_TE)
    monkeypatch.setattr(grids, "CHUNK", 7 * 256)
    assert torch.equal(grids.nearest(native, ratio_TE, weight_TE), whole)


def test_a_missing_grid_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    grids.vectors_of.cache_clear()
    monkeypatch.delattr(gguf.quants, "IQ2_S")
    with pytest.raises(ModelError, match=r"the package gguf .* has no grid of 1024 vectors"):
        grids.vectors_of(VECTORS["IQ2_S"])
