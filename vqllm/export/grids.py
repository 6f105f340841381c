"""Codes that stand for several weights: a vector of a grid, and a sign for each of its elements.

Grids have magnitudes only. Some types store all signs; the others 7 of 8, with an even number of
minus signs among the 8. A tile is what has to be coded together: 8 weights where signs depend on
each other, else one vector. Its code is the numbers of its vectors and, last, its signs as bits,
lowest first, where 1 is a minus.

Codes of a tile r are searched for in the norm of a matrix D. The signs σ are those of r; where they
have to be even and are not, the one is turned over that costs least, which is a small weight. Then

    (r − σ∘g) D (r − σ∘g)ᵀ = r D rᵀ − 2 (r D ∘ σ) gᵀ + Σ_ef σ_e σ_f D_ef g_e g_f

is linear in g and in the products g_e g_f, so that one product with a table of all vectors gives it
for the whole grid. Other signs may be better still; trying them brought nothing on real weights.

Source: llama.cpp (MIT), ggml/src/ggml-common.h; the package `gguf` has the grids, as data of its
decoders, and they are taken from there.
"""

from functools import cache
from importlib.metadata import version
from typing import Any

import gguf
import torch
from torch import Tensor

from vqllm.errors import ModelError
from vqllm.export.native_types import NativeType

CHUNK = 1 << 20
"""Errors of tiles with vectors that are in memory at a time."""


@cache
def vectors_of(native: NativeType) -> Tensor:
    """The grid of a type, float32 [N, width].

    Raises:
        ModelError: the package `gguf` that is installed does not have it.
    """
    assert native.grid is not None
    owner: Any = getattr(getattr(gguf, "quants", None), native.name, None)
    if hasattr(owner, "init_grid"):
        owner.init_grid()
    found = getattr(owner, "grid", None)
    wanted = (native.grid.size, native.grid.width)
    if found is None or tuple(found.shape[-2:]) != wanted:
        raise ModelError(
            f"the package gguf {version('gguf')} has no grid of {wanted[0]} vectors for "
            f"{native.name}, which its versions 0.17 to 0.19 have; install one of them."
        )
    return torch.tensor(found, dtype=torch.float32).reshape(wanted)


def reproduced(native: NativeType, codes: Tensor) -> Tensor:
    """Signed vectors of codes [..., M] of tiles: float32 [..., tile]."""
    grid = vectors_of(native).to(codes.device)
    magnitudes = grid[codes[..., :-1].long()].flatten(-2)
    return magnitudes * _signs_of(codes[..., -1], native.tile_cols)


def nearest(
    native: NativeType, ratio_TE: Tensor, weight_TE: Tensor, D_EE: Tensor | None = None
) -> Tensor:
    """Codes of tiles of weights over their steps, int32 [T, M].

    Args:
        weight_TE: what squared errors cost: the diagonal of the norm.
        D_EE: the whole matrix of the norm, if it has more; the same for all tiles.
    """
    assert native.grid is not None
    rows = max(CHUNK // native.grid.size, 1)
    chunks = zip(ratio_TE.split(rows), weight_TE.split(rows), strict=True)
    return torch.cat([_codes(native, *own, D_EE) for own in chunks])


def _codes(native: NativeType, ratio_TE: Tensor, weight_TE: Tensor, D_EE: Tensor | None) -> Tensor:
    """Codes of a chunk of tiles."""
    assert native.grid is not None
    minus_TE = ratio_TE < 0
    if native.grid.parity:
        minus_TE = _even(minus_TE, ratio_TE.abs() * weight_TE)
    signs_TE = 1.0 - 2.0 * minus_TE.float()
    numbers, width = [], native.grid.width
    gap_TE = torch.zeros_like(ratio_TE)  # vectors that are not chosen yet count as exact
    for start in range(0, native.tile_cols, width):
        cols = slice(start, start + width)
        gap_TE[:, cols] = ratio_TE[:, cols]
        pulled_TW = (gap_TE * weight_TE if D_EE is None else gap_TE @ D_EE)[:, cols]
        signs_TW = signs_TE[:, cols]
        own_WW = None if D_EE is None else D_EE[cols, cols]
        number_T = _best(native, signs_TW, pulled_TW, weight_TE[:, cols], own_WW)
        gap_TE[:, cols] -= signs_TW * vectors_of(native).to(ratio_TE.device)[number_T]
        numbers.append(number_T)
    places = torch.arange(native.tile_cols, device=ratio_TE.device)
    bits_T = (minus_TE.long() << places).sum(1)
    return torch.stack([*numbers, bits_T], 1).int()


def _even(minus_TE: Tensor, cost_TE: Tensor) -> Tensor:
    """Signs with an even number of minus: that of the least cost is turned over where needed."""
    odd_T = minus_TE.sum(1) % 2 == 1
    turned_TE = torch.zeros_like(minus_TE).scatter(1, cost_TE.argmin(1, keepdim=True), True)
    return minus_TE ^ (turned_TE & odd_T[:, None])


def _best(
    native: NativeType,
    signs_TW: Tensor,
    pulled_TW: Tensor,
    weight_TW: Tensor,
    D_WW: Tensor | None,
) -> Tensor:
    """Numbers of the best vectors for given signs, [T].

    Args:
        pulled_TW: r D.
        weight_TW: the diagonal of D.
        D_WW: all of D, if it has more.
    """
    grid_WN, squares_WN, products = (own.to(signs_TW.device) for own in _tables(native))
    features, table = [weight_TW, -2 * pulled_TW * signs_TW], [squares_WN, grid_WN]
    if D_WW is not None:
        first, second = _pairs(len(grid_WN))
        features.append(2 * D_WW[first, second] * signs_TW[:, first] * signs_TW[:, second])
        table.append(products)
    return (torch.cat(features, 1) @ torch.cat(table)).argmin(1)


def _signs_of(bits: Tensor, width: int) -> Tensor:
    """Signs ±1 of numbers of `width` bits."""
    places = torch.arange(width, device=bits.device)
    return 1.0 - 2.0 * ((bits[..., None] >> places) & 1).float()


@cache
def _tables(native: NativeType) -> tuple[Tensor, Tensor, Tensor]:
    """Of all vectors their elements, the squares and the products of two elements, [.., N]."""
    grid_WN = vectors_of(native).T.contiguous()
    first, second = _pairs(len(grid_WN))
    return grid_WN, grid_WN.square(), grid_WN[first] * grid_WN[second]


def _pairs(width: int) -> tuple[Tensor, Tensor]:
    """Places above the diagonal of a matrix."""
    first, second = torch.triu_indices(width, width, 1)
    return first, second
