"""A small learned codebook for every group of rows and columns: the codes of GPTVQ.

Three options make small groups worth their bits. Codebooks may be fitted when a rule that
compensates errors comes to their columns, to the targets at that moment (`fit: per_group`). A
stretch of a row may be divided by a scale before coding (`scale_cols`). And codebooks may be stored
as integers. Bits a weight beside the codes, for groups of g weights and K entries of d weights:

    codebook: float16   16 K d / g
    codebook: int8      (8 K d + 16) / g
    codebook: svd       8 rank / g, for single weights, and 32 K rank bits that all share
    scale_cols: s       4 / (s · tile_rows), and 256 bits for every s columns

Proxy losses in units of 10^-4 after LDLQ, without transforms, of four projections of a Llama of 135
million weights, pairs of weights at 2 bits:

    codebooks                                 bits          o     q     up    down
    one (kmeans)                              2.00          209   283   764   698
    8 x 256, float16, once                    2.25 - 2.33   120   200   732   645
    8 x 256, float16, per_group               2.25 - 2.33   114   189   711   621
    8 x 256, int8, per_group                  2.13 - 2.18   112   189   711   620
    8 x 256, int8, per_group, scale_cols 64   2.20 - 2.25    98   177   703   608

A code has another meaning in every group. Searches over sums of codecs regroup tiles, so they need
kmeans instead.

Source: van Baalen et al., "GPTVQ", arXiv 2402.15319.
"""

from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from vqllm.codecs import lloyd
from vqllm.codecs.base import CODECS, check_finite, weigh
from vqllm.codecs.kmeans import ClusteredCodec, narrowed
from vqllm.core import threads
from vqllm.core.protocols import Point, State
from vqllm.errors import RecipeError
from vqllm_kernels.bitpack import pack_bits, unpack_bits
from vqllm_kernels.lut import reference_v2 as reference
from vqllm_kernels.lut.spec import GroupedLutSpec

_LARGEST_INT8 = 127
"""Of a codebook stored as integers, which is symmetric."""
_LARGEST_INDEX = (1 << reference.SCALE_BITS) - 1
_GRAM_BLOCK = 64
"""Codebooks whose products are summed at a time: few enough that no sum is split over threads."""
_MIN_STEP = 1e-30
"""Of the integers of a codebook, where all of them are zero."""
_ALL = 1 << 40


class _Part(NamedTuple):
    """Groups of equal height: their rows of tiles and their own places."""

    tiles: slice
    groups: slice


def _point(label: str, mse: float, **options: int | str) -> Point:
    return Point(
        label=label,
        options=options,
        mse=mse,
        source="measured",
        num_weights=1 << 18,
        quick=False,
    )


@CODECS.register("grouped_kmeans")
class GroupedKMeans(ClusteredCodec):
    """A codebook learned for each group of `group_rows` x `group_cols` weights."""

    # Lower than those of one codebook, at more bits: small groups fit the chance of their weights.
    points: ClassVar[tuple[Point, ...]] = (
        _point("1x2, 16 entries for 8x256", 0.1036, index_bits=4, group_rows=8),
        _point("1x2, 64 entries for 32x256", 0.0282, index_bits=6, group_rows=32),
        _point(
            "1x1, 8 entries for 2x256, rank 4",
            0.0334,
            tile_cols=1,
            index_bits=3,
            group_rows=2,
            codebook="svd",
        ),
    )

    # `fit` in a recipe; as an attribute that name is the method that fits.
    model_config = ConfigDict(serialize_by_alias=True)

    type: Literal["grouped_kmeans"] = "grouped_kmeans"
    group_rows: int | None = Field(
        None, ge=1, description="rows that share a codebook; null is all of them"
    )
    group_cols: int | None = Field(
        256, ge=1, description="columns that share a codebook; null is all of them"
    )
    fit_at: Literal["once", "per_group"] = Field(
        "per_group",
        alias="fit",
        description="codebooks of the original weights (once), or, in ldlq, fitted again to each "
        "group of columns when the errors of those coded before it are made up for (per_group)",
    )
    codebook: Literal["float16", "int8", "svd"] = Field(
        "int8",
        description="how codebooks are stored: int8 has a scale for each; svd, for single weights, "
        "has `rank` integers for each and vectors that all share",
    )
    rank: int | None = Field(
        None, ge=1, description="of codebooks stored as svd; null is half the number of entries"
    )
    scale_cols: int | None = Field(
        None,
        ge=1,
        description="columns over which a row of tiles has a scale of 4 bits, its largest weight "
        "there; null is no scales",
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> "GroupedKMeans":
        tile_rows, tile_cols = self.tile
        _check_multiple("group_rows", self.group_rows, tile_rows, "tile_rows")
        _check_multiple("group_cols", self.group_cols, tile_cols, "tile_cols")
        _check_multiple("scale_cols", self.scale_cols, tile_cols, "tile_cols")
        if self.fit_at == "per_group" and self.group_cols is None:
            raise RecipeError(
                "codec grouped_kmeans: fit per_group with group_cols null; say how many columns "
                "share a codebook (256 in GPTVQ), or set fit to once"
            )
        return self

    @model_validator(mode="after")
    def _rank_fits(self) -> "GroupedKMeans":
        if self.codebook != "svd" and self.rank is not None:
            raise RecipeError(
                f"codec grouped_kmeans: rank {self.rank} with codebook {self.codebook}; only svd "
                "has a rank"
            )
        if self.codebook == "svd" and self.tile != (1, 1):
            raise RecipeError(
                f"codec grouped_kmeans: codebook svd with tiles {self.tile}; it needs codebooks "
                "that can be sorted: tile_rows 1 and tile_cols 1, or codebook int8"
            )
        if self.rank is not None and self.rank > self.num_entries:
            raise RecipeError(
                f"codec grouped_kmeans: rank {self.rank}; allowed is 1 to {self.num_entries}, the "
                "number of entries"
            )
        return self

    @property
    def refit_cols(self) -> int | None:
        return self.group_cols if self.fit_at == "per_group" else None

    @property
    def _rank(self) -> int | None:
        return (self.rank or self.num_entries // 2) if self.codebook == "svd" else None

    def spec(self) -> GroupedLutSpec:
        return GroupedLutSpec(
            tile_rows=self.tile_rows,
            tile_cols=self.tile_cols,
            index_bits=self.index_bits,
            group_rows=self.group_rows,
            group_cols=self.group_cols,
            codebook=self.codebook,
            rank=self._rank,
            scale_cols=self.scale_cols,
        )

    def fit(self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator) -> State:
        """Codebooks, and scales where there are any.

        float16: `codebook` as it is stored. int8: `codebook` float32 [G, H, K, E], every codebook
        integers times a scale. svd: `coefficients` and `basis`, float32. Scales: `scale_index`
        uint8 [I, B], and `scale_table` as it is stored.
        """
        check_finite(X_IJE, self)
        # Tiles over their scales; then a codebook for each group: G of rows, H of columns.
        scales = self._fit_scales(X_IJE)
        x_IJE, weight_IJE = self._normalised(X_IJE, weight_IJE, scales, 0)
        parts = self._row_parts(len(X_IJE))
        columns = []
        for _, own in self._stretches(0, X_IJE.shape[1]):
            books = [
                self.cluster(*_of_groups(x_IJE, weight_IJE, own, part), generator) for part in parts
            ]
            columns.append(torch.cat(books))
        entries_GHKE = torch.stack(columns, 1)
        if self._rank is not None:
            return {**_factorised(entries_GHKE, self._rank), **scales}
        return {"codebook": self._storable(entries_GHKE), **scales}

    def refit(self, X_IJE: Tensor, weight_IJE: Tensor | None, state: State, col: int) -> State:
        # Lloyd's algorithm goes on from the codebook of `fit`: a fresh start gave 1 to 9 % more
        # proxy loss. Scales stay as they are: those of X gave up to 5 % more.
        check_finite(X_IJE, self)
        x_IJE, weight_IJE = self._normalised(X_IJE, weight_IJE, state, col)
        everything = slice(0, X_IJE.shape[1])
        own = slice(col // self._group_width, col // self._group_width + 1)
        start_GKE = self._entries(state, own)[:, 0]
        moved = []
        for part in self._row_parts(len(X_IJE)):
            x_GNE, weight_GNE = _of_groups(x_IJE, weight_IJE, everything, part)
            moved.append(lloyd.lloyd(x_GNE, weight_GNE, start_GKE[part.groups], self.iterations))
        entries_G1KE = torch.cat(moved)[:, None]
        if self.codebook == "svd":
            name, stored = "coefficients", _coefficients(entries_G1KE, state["basis"])
        else:
            name, stored = "codebook", self._storable(entries_G1KE)
        whole = state[name].clone()
        whole[:, own] = stored
        return {**state, name: whole}

    def encode(
        self, X_IJE: Tensor, state: State, col: int = 0, weight_E: Tensor | None = None
    ) -> Tensor:
        check_finite(X_IJE, self)
        x_IJE, _ = self._normalised(X_IJE, None, state, col)
        if weight_E is not None:
            x_IJE = weigh(x_IJE, weight_E)
        index_IJ = torch.empty(X_IJE.shape[:2], dtype=torch.int32, device=X_IJE.device)
        for h, own in self._stretches(col, X_IJE.shape[1]):
            entries_GKE = self._entries(state, slice(h, h + 1))[:, 0]
            if weight_E is not None:
                entries_GKE = weigh(entries_GKE, weight_E)
            for part in self._row_parts(len(X_IJE)):
                x_GNE, _ = _of_groups(x_IJE, None, own, part)
                index_GN = lloyd.assign(x_GNE, None, entries_GKE[part.groups])
                index_IJ[part.tiles, own] = index_GN.reshape(-1, own.stop - own.start).int()
        return index_IJ[..., None]

    def decode(self, codes_IJM: Tensor, state: State, col: int = 0) -> Tensor:
        num_rows, num_cols, _ = codes_IJM.shape
        row_I = torch.arange(num_rows, device=codes_IJM.device)
        column_J = torch.arange(col, col + num_cols, device=codes_IJM.device)
        first, last = col // self._group_width, (col + num_cols - 1) // self._group_width
        entries_GHKE = self._entries(state, slice(first, last + 1))
        group_I, group_J = row_I // self._group_height, column_J // self._group_width - first
        index_IJ = codes_IJM[..., 0] & (self.num_entries - 1)
        X_IJE = reference.look_up(entries_GHKE, index_IJ, group_I, group_J)
        return X_IJE if self.scale_cols is None else X_IJE * self._scale(state, col, num_cols)

    def project(self, state: State) -> State:
        if self.codebook == "float16":
            return super().project(state)
        projected = dict(state)
        if self.scale_cols is not None:
            projected["scale_table"] = state["scale_table"].detach().bfloat16()
        if self.codebook == "int8":
            projected["codebook"] = self._storable(state["codebook"].detach())
            return projected
        # Where integers are out of range, the basis vector grows in their place.
        factors_GHr = state["coefficients"].detach().float()
        excess_r = (factors_GHr.abs().amax((0, 1)) / _LARGEST_INT8).clamp(min=1)
        projected["coefficients"] = (factors_GHr / excess_r).round()
        projected["basis"] = state["basis"].detach().float() * excess_r[:, None]
        return projected

    def pack(self, codes_IJM: Tensor, state: State) -> dict[str, Tensor]:
        # The state has codebooks as numbers; int8 ones are divided by their scale again.
        packed = {"codes": pack_bits(codes_IJM[..., 0], self.index_bits)}
        if self.codebook == "svd":
            packed["coefficients"] = state["coefficients"].to(torch.int8)
            packed["basis"] = state["basis"]
        elif self.codebook == "int8":
            scale_GH11 = _int8_scale(state["codebook"])
            integers = torch.where(scale_GH11 > 0, state["codebook"] / scale_GH11, 0).round()
            packed["codebook"] = integers.to(torch.int8)
            packed["codebook_scale"] = scale_GH11[..., 0, 0].bfloat16()
        else:
            packed["codebook"] = state["codebook"]
        if self.scale_cols is not None:
            packed["scale_index"] = pack_bits(state["scale_index"], reference.SCALE_BITS)
            packed["scale_table"] = state["scale_table"]
        return packed

    def unpack(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Tensor, State]:
        _, num_tile_cols = self.spec().grid(rows, cols)
        codes_IJM = unpack_bits(tensors["codes"], self.index_bits, num_tile_cols)[..., None]
        state = {}
        if self.codebook == "svd":
            state["coefficients"] = tensors["coefficients"].float()
            state["basis"] = tensors["basis"]
        else:
            is_float16 = self.codebook == "float16"
            state["codebook"] = tensors["codebook"] if is_float16 else reference.entries(tensors)
        if self.scale_cols is not None:
            table_BQ = tensors["scale_table"]
            index = unpack_bits(tensors["scale_index"], reference.SCALE_BITS, len(table_BQ))
            state["scale_index"], state["scale_table"] = index.to(torch.uint8), table_BQ
        return codes_IJM, state

    @property
    def _group_height(self) -> int:
        """Rows of tiles of a group; more than there are for all."""
        return self.group_rows // self.tile_rows if self.group_rows else _ALL

    @property
    def _group_width(self) -> int:
        """Columns of tiles of a group; more than there are for all."""
        return self.group_cols // self.tile_cols if self.group_cols else _ALL

    def _row_parts(self, num_tile_rows: int) -> list[_Part]:
        """Whole groups of rows, and what is left."""
        height = min(self._group_height, num_tile_rows)
        num = num_tile_rows // height
        parts = [_Part(slice(0, num * height), slice(0, num))]
        if num_tile_rows % height:
            parts.append(_Part(slice(num * height, num_tile_rows), slice(num, num + 1)))
        return parts

    def _stretches(self, col: int, num_cols: int) -> Iterator[tuple[int, slice]]:
        """Columns of groups, and which of `num_cols` columns of tiles from `col` on are theirs."""
        width = self._group_width
        for h in range(col // width, (col + num_cols - 1) // width + 1):
            yield h, slice(max(h * width - col, 0), min((h + 1) * width - col, num_cols))

    def _entries(self, state: State, own: slice) -> Tensor:
        """Codebooks of some columns of groups, float32 [G, H, K, E]."""
        names = {"codebook", "coefficients"} & state.keys()
        return reference.entries({**state, **{name: state[name][:, own] for name in names}})

    def _storable(self, entries_GHKE: Tensor) -> Tensor:
        """The nearest codebooks that can be stored, in the form of the state."""
        if self.codebook == "float16":
            return self.half(entries_GHKE)
        scale_GH11 = _int8_scale(entries_GHKE.float()).bfloat16().float()
        integers = torch.where(scale_GH11 > 0, entries_GHKE / scale_GH11, 0).round()
        return integers.clamp(-_LARGEST_INT8, _LARGEST_INT8) * scale_GH11

    def _fit_scales(self, X_IJE: Tensor) -> State:
        """`scale_index` and `scale_table` of the largest weights; nothing where there are none.

        The scales of a column of blocks are equally spaced in the logarithm.
        """
        if self.scale_cols is None:
            return {}
        # The largest weight of each block (I, B). An index counts equal steps of its logarithm from
        # the least to the largest in the column of blocks; a block of zeros gets the least.
        width = self.scale_cols // self.tile_cols
        peak_IJ = X_IJE.float().abs().amax(2)
        peak_IJ = torch.nn.functional.pad(peak_IJ, (0, -X_IJE.shape[1] % width))
        peak_IB = peak_IJ.unflatten(1, (-1, width)).amax(2)
        log_IB = torch.where(peak_IB > 0, peak_IB, torch.inf).log2()
        low_B = log_IB.amin(0).nan_to_num(posinf=0)
        high_B = torch.where(peak_IB > 0, log_IB, low_B).amax(0)
        step_B = (high_B - low_B) / _LARGEST_INDEX
        index_IB = ((log_IB - low_B) / step_B.clamp(min=1e-9)).nan_to_num(posinf=0)
        index_IB = torch.where(peak_IB > 0, index_IB, 0).round().clamp(0, _LARGEST_INDEX)
        number_Q = torch.arange(_LARGEST_INDEX + 1, device=X_IJE.device)
        table_BQ = torch.exp2(low_B[:, None] + step_B[:, None] * number_Q)
        return {"scale_index": index_IB.to(torch.uint8), "scale_table": table_BQ.bfloat16()}

    def _scale(self, state: State, col: int, num_cols: int) -> Tensor:
        """[I, J, 1], for the columns of tiles from `col` on."""
        assert self.scale_cols is not None
        table_BQ = state["scale_table"]
        column_J = torch.arange(col, col + num_cols, device=table_BQ.device)
        block_J = column_J // (self.scale_cols // self.tile_cols)
        return reference.scale_of_tiles(state["scale_index"], table_BQ, block_J)

    def _normalised(
        self, X_IJE: Tensor, weight_IJE: Tensor | None, state: State, col: int
    ) -> tuple[Tensor, Tensor | None]:
        """Tiles over their scales, and weights times scale², so that errors count as before."""
        x_IJE = X_IJE.float()
        if weight_IJE is not None:
            weight_IJE = narrowed(weight_IJE.float())
            weight_IJE = weight_IJE.expand(*X_IJE.shape[:2], weight_IJE.shape[2])
        if self.scale_cols is None:
            return x_IJE, weight_IJE
        scale_IJ1 = self._scale(state, col, X_IJE.shape[1])
        weight_IJ1 = (scale_IJ1 / scale_IJ1.amax()) ** 2
        return x_IJE / scale_IJ1, weight_IJ1 if weight_IJE is None else weight_IJE * weight_IJ1


def _check_multiple(name: str, size: int | None, unit: int, of: str) -> None:
    if size is not None and size % unit:
        raise RecipeError(
            f"codec grouped_kmeans: {name} is {size}; allowed are multiples of {of} ({unit})"
        )


def _of_groups(
    x_IJE: Tensor, weight_IJE: Tensor | None, own: slice, part: _Part
) -> tuple[Tensor, Tensor | None]:
    """Vectors and weights of each group of a part, in the columns of tiles `own`: [G, N, ..]."""
    num_groups = part.groups.stop - part.groups.start

    def gather(values_IJE: Tensor) -> Tensor:
        return values_IJE[part.tiles, own].unflatten(0, (num_groups, -1)).flatten(1, 2)

    return gather(x_IJE), None if weight_IJE is None else gather(weight_IJE)


def _int8_scale(entries_GHKE: Tensor) -> Tensor:
    """The scale of the integers of each codebook, [G, H, 1, 1].

    In bfloat16 it is at most 0.4 % off, so that the largest entry is 127 of it again: from a
    codebook that is stored the scale comes out as it was.
    """
    return entries_GHKE.abs().amax((2, 3), keepdim=True) / _LARGEST_INT8


@threads.one_thread()
def _factorised(entries_GHKE: Tensor, rank: int) -> State:
    """`coefficients` [G, H, rank] and `basis` [rank, K] nearest to sorted codebooks of numbers."""
    # The basis has the `rank` largest eigenvectors of Σ c cᵀ over all codebooks c, which leave the
    # least squared error.
    sorted_BK = entries_GHKE[..., 0].sort(dim=2).values.flatten(0, 1).double().cpu()
    gram_KK = torch.zeros(2 * (sorted_BK.shape[1],), dtype=torch.float64)
    for block_BK in sorted_BK.split(_GRAM_BLOCK):
        gram_KK += block_BK.T @ block_BK
    vectors_rK = torch.linalg.eigh(gram_KK).eigenvectors.flip(1).T[:rank]
    # The sign of an eigenvector is arbitrary: its largest element is made positive. Its length is
    # such that the largest coefficient is the integer 127.
    largest_r1 = vectors_rK.take_along_dim(vectors_rK.abs().argmax(1, keepdim=True), 1)
    vectors_rK = vectors_rK * largest_r1.sign()
    peak_r = (sorted_BK @ vectors_rK.T).abs().amax(0)
    basis_rK = vectors_rK * (peak_r / _LARGEST_INT8).clamp(min=_MIN_STEP)[:, None]
    basis_rK = basis_rK.float().to(entries_GHKE.device)
    return {"coefficients": _coefficients(entries_GHKE, basis_rK), "basis": basis_rK}


def _coefficients(entries_GHKE: Tensor, basis_rK: Tensor) -> Tensor:
    """The integers that bring the basis nearest to each sorted codebook, float32 [G, H, rank]."""
    sorted_GHK = entries_GHKE[..., 0].sort(dim=2).values.double()
    basis_rK = basis_rK.double()
    exact_GHr = torch.linalg.solve(basis_rK @ basis_rK.T, basis_rK @ sorted_GHK[..., None])[..., 0]
    return exact_GHr.round().clamp(-_LARGEST_INT8, _LARGEST_INT8).float()
