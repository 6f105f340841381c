"""Rows in groups, a codebook for each group, and no tensor for the group of a row.

A row has a scale anyway, and of the exponents of a scale a matrix needs a few values only. The
stored scales of a group's rows are in a band of exponents of its own, so that a reader finds the
group from the scale (`vqllm_kernels.grouped.reference`). A row can choose any codebook, as if its
choice were stored. Codebooks, codes and choices are learned in turn:

    codebooks   every entry becomes the mean of its tiles
    codes       every tile moves to the best of the entries next to its present one
    groups      every row moves to the codebook that codes it best, its tiles to the best of the
                entries of that codebook next to their present ones

After Yvinec, Dapogny and Bailly, "Network Memory Footprint Compression Through Jointly Learnable
Codebooks and Mappings" (JLCM), arXiv 2309.17361: groups of alike neurons with codebooks that need
no map, codebooks and codes learned together, codes that move to near codewords only. There
reordered neurons save the map; here bands of scales, which leave the rows in their places. There
the gradient of a code is damped by the distance of the codewords; here a code takes the step to a
neighbour that lowers the weighted squared error most.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vqllm.codecs import lloyd
from vqllm.codecs.base import CODECS, check_finite, nearest_entry, weigh
from vqllm.codecs.entries import apart, distinct
from vqllm.core.protocols import Codec, Point, State
from vqllm.errors import NumericalError
from vqllm_kernels.bitpack import pack_bits, unpack_bits
from vqllm_kernels.grouped import reference
from vqllm_kernels.grouped.spec import GroupedSpec

_MAX_NUMBERS = 1 << 21
"""Numbers in memory at a time while tiles are compared with neighbouring entries: 8 MB."""
_FEWEST_COLS = 32
"""Tiles of every row, at least, that decide its codebook."""
_START_PASSES = 10
"""Passes of Lloyd's algorithm over each group before codes only move to neighbours."""
_TINY = 1e-30
"""In place of a zero that divides."""

_MAX = "Lloyd-Max: Max, IRE Trans. Inform. Theory 6 (1960), table I"
_PALETTE = "Q-Palette, arXiv 2509.20214, k-means"


def _point(tile_cols: int, index_bits: int, mse: float, source: str) -> Point:
    return Point(
        label=f"4 codebooks 1x{tile_cols}, {1 << index_bits} entries",
        options={"tile_cols": tile_cols, "index_bits": index_bits, "groups": 4},
        mse=mse,
        source=source,
        num_weights=1 << 19,
        quick=False,
    )


@CODECS.register("grouped")
class Grouped(Codec):
    """A scale for each row and a codebook for each group of rows.

    Its state has the groups as a tensor and the scales without the places of their bands, so that
    tuning may move scales freely; only `pack` joins them.
    """

    weighted: ClassVar[bool] = True

    # On Gaussian weights a codebook for a part of the rows is that of all rows. It codes the
    # weights that it is fitted to better than others, because it fits their chance too: 4 x 256
    # quadruples have 0.0927 on 2^19 weights, 0.0971 on 2^22, and 0.0989 on other weights.
    points: ClassVar[tuple[Point, ...]] = (
        _point(1, 2, 0.1175, _MAX),
        _point(2, 4, 0.1086, _PALETTE),
        _point(2, 6, 0.0297, _PALETTE),
        _point(4, 8, 0.0989, "measured"),
    )

    type: Literal["grouped"] = "grouped"
    tile_cols: Literal[1, 2, 4, 8] = Field(4, description="columns of a tile: 1, 2, 4 or 8")
    index_bits: int = Field(
        8, ge=1, le=12, description="bits of an index; a codebook has 2^index_bits entries"
    )
    groups: int = Field(
        4, ge=1, le=reference.MAX_GROUPS, description="groups of rows, a codebook each"
    )
    rounds: int = Field(4, ge=0, description="how often rows choose anew among the codebooks")
    passes: int = Field(4, ge=1, description="passes over codebooks and codes after each choice")
    neighbours: int = Field(
        16, ge=1, description="entries next to its present one that a tile may move to in a pass"
    )
    sample: int = Field(
        1 << 16, ge=1, description="tiles a codebook is fitted on, on average, drawn at random"
    )

    @property
    def tile(self) -> tuple[int, int]:
        return (1, self.tile_cols)

    def spec(self) -> GroupedSpec:
        return GroupedSpec(tile_cols=self.tile_cols, index_bits=self.index_bits, groups=self.groups)

    def fit(self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator) -> State:
        """`scale` bfloat16 [I], `group` uint8 [I] and `codebook` float16 [G, K, E].

        Errors count relative to the size of their row: scales are taken out first, so that rows of
        different size are no reason for another codebook, and rows of different distribution are.
        Rows start in the order of the ratio of their mean magnitude to their root mean square: 0.71
        for a Laplace distribution, 0.80 for a Gaussian, 0.87 for a uniform one. From there mixed
        rows of these (2^19 weights, tiles of 4, 4 codebooks of 256 entries) end at a distortion of
        0.083; from the order of their sizes, or from chance, at 0.089.
        """
        # The root mean square of each row, and the shape of its distribution, which starts groups.
        check_finite(X_IJE, self)
        X_IJE, weight_IJE = X_IJE.float(), _by_tile(weight_IJE, X_IJE)
        rms_I = _row_mean(X_IJE**2, weight_IJE).sqrt()
        if rms_I.max() > reference.LARGEST_SCALE:
            raise NumericalError(
                f"codec grouped: a row with a root mean square of {float(rms_I.max()):.3g} is "
                f"beyond the largest scale, {reference.LARGEST_SCALE:g}. Scale the weights down "
                "with a scaling transform."
            )
        shape_I = _row_mean(X_IJE.abs(), weight_IJE) / rms_I.clamp(min=_TINY)
        scale_I = _storable(rms_I)
        cols_S = self._drawn_cols(X_IJE, generator)
        x_ISE = X_IJE[:, cols_S] / scale_I.float()[:, None, None]
        learned = _Learned(x_ISE, weight_IJE[:, cols_S], _equal_parts(shape_I, self.groups))
        # In each round rows choose among the codebooks; then codes and codebooks follow in turn.
        learned.start(self.groups, 1 << self.index_bits, generator)
        for chosen in range(self.rounds + 1):
            if chosen:
                learned.choose_groups(self.neighbours)
            for _ in range(self.passes):
                learned.move_codes(self.neighbours)
                learned.update_codebooks()
        largest = torch.finfo(torch.float16).max
        return {
            "scale": scale_I,
            "group": learned.group_I.to(torch.uint8),
            "codebook": distinct(learned.entries_GKE.clamp(-largest, largest).half()),
        }

    def _drawn_cols(self, X_IJE: Tensor, generator: torch.Generator) -> Tensor:
        """Grid columns [S] of the tiles that are learned from, the same for all rows."""
        num_rows, num_cols, _ = X_IJE.shape
        num = max(_FEWEST_COLS, -(-self.sample * self.groups // num_rows))
        return lloyd.draw(num_cols, num, generator).to(X_IJE.device)

    def encode(
        self, X_IJE: Tensor, state: State, col: int = 0, weight_E: Tensor | None = None
    ) -> Tensor:
        return self.candidates(X_IJE, state, 1, weight_E)

    def candidates(
        self, X_IJE: Tensor, state: State, num: int, weight_E: Tensor | None = None
    ) -> Tensor:
        """Up to `num` codes near each tile, int32 [I, J, V], the nearest first.

        Unlike those of a `SearchableCodec`, tiles cannot be regrouped: the rows of X are those of
        the matrix.
        """
        check_finite(X_IJE, self)
        x_IJE = X_IJE.float() / state["scale"].float()[:, None, None]
        table_GKE = state["codebook"].float()
        if weight_E is not None:
            x_IJE, table_GKE = weigh(x_IJE, weight_E), weigh(table_GKE, weight_E)
        num = min(num, table_GKE.shape[1])
        codes_IJV = torch.empty(*X_IJE.shape[:2], num, dtype=torch.int32, device=X_IJE.device)
        for g, table_KE in enumerate(table_GKE):
            rows_N = (state["group"] == g).nonzero()[:, 0]
            if len(rows_N):
                x_NJE = x_IJE[rows_N]
                index = nearest_entry(x_NJE.flatten(0, 1), table_KE, num)
                codes_IJV[rows_N] = index.to(torch.int32).unflatten(0, x_NJE.shape[:2])
        return codes_IJV

    def moves(self, codes_IJM: Tensor, state: State, num: int) -> Tensor:
        """The codes next to given ones, int32 [I, J, V]: `num` at most, the given one first.

        For rules that improve codes step by step: the entries nearest to the entry of the code, in
        the Euclidean norm, as in fitting.
        """
        near_PV = _neighbours(state["codebook"].float(), num)
        num_entries = state["codebook"].shape[1]
        first_I11 = state["group"].to(torch.int64)[:, None, None] * num_entries
        return (near_PV[(first_I11 + codes_IJM)[..., 0]] - first_I11).to(torch.int32)

    def decode(self, codes_IJM: Tensor, state: State, col: int = 0) -> Tensor:
        return reference.reproduce(
            codes_IJM[..., 0], state["scale"], state["group"], state["codebook"]
        )

    def pack(self, codes_IJM: Tensor, state: State) -> dict[str, Tensor]:
        return {
            "codes": pack_bits(codes_IJM[..., 0], self.index_bits),
            "scale": reference.join(state["scale"], state["group"]),
            "codebook": state["codebook"],
        }

    def unpack(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Tensor, State]:
        _, num_tile_cols = self.spec().grid(rows, cols)
        codes_IJM = unpack_bits(tensors["codes"], self.index_bits, num_tile_cols)[..., None]
        scale_I, group_I = reference.split(tensors["scale"])
        return codes_IJM, {"scale": scale_I, "group": group_I, "codebook": tensors["codebook"]}

    def project(self, state: State) -> State:
        projected = super().project({**state, "scale": _storable(state["scale"])})
        return {**projected, "codebook": apart(projected["codebook"])}


class _Learned:
    """Codebooks, the codebook of each row and the entry of each tile, while they are learned.

    The entries of all codebooks are counted together: place g · K + k of P = G · K.
    """

    entries_GKE: Tensor
    place_N: Tensor
    """Of each tile, row by row, N = I · S."""

    def __init__(self, x_ISE: Tensor, weight_ISE: Tensor, group_I: Tensor) -> None:
        """
        Args:
            x_ISE: S tiles of each row.
            weight_ISE: of the errors of their elements, or [I, S, 1] of the tiles.
            group_I: the codebook of each row to begin with, int64.
        """
        self.num_cols = x_ISE.shape[1]
        self.x_NE, self.weight_NE = x_ISE.flatten(0, 1), weight_ISE.flatten(0, 1)
        self.group_I = group_I

    def _tiles_of(self, group: int) -> Tensor:
        """Indices of the tiles of a group's rows."""
        return (self.group_I == group).repeat_interleave(self.num_cols).nonzero()[:, 0]

    def start(self, num_groups: int, num_entries: int, generator: torch.Generator) -> None:
        """Codebooks by Lloyd's algorithm, each by itself; a group without rows gets the codebook of
        all tiles."""
        entries = []
        self.place_N = torch.zeros(len(self.x_NE), dtype=torch.int64, device=self.x_NE.device)
        for g in range(num_groups):
            own_N = self._tiles_of(g)
            some_N = own_N if len(own_N) else torch.arange(len(self.x_NE), device=own_N.device)
            x_1NE, weight_1NE = self.x_NE[some_N][None], self.weight_NE[some_N][None]
            entries_1KE = lloyd.start(x_1NE, weight_1NE, num_entries, "auto", generator)
            entries_1KE = lloyd.lloyd(x_1NE, weight_1NE, entries_1KE, _START_PASSES)
            entries.append(entries_1KE)
            if len(own_N):
                index_1N = lloyd.assign(x_1NE, weight_1NE, entries_1KE)
                self.place_N[own_N] = g * num_entries + index_1N[0]
        self.entries_GKE = torch.cat(entries)

    def update_codebooks(self) -> None:
        """Entries become the means of their tiles. An entry without tiles becomes the tile of its
        group that has the largest error."""
        num_groups, num_entries, _ = self.entries_GKE.shape
        mean_1PE, mass_1PE = lloyd.means(
            self.x_NE[None], self.weight_NE[None], self.place_N[None], num_groups * num_entries
        )
        old_PE = self.entries_GKE.flatten(0, 1)
        new_PE = torch.where(mass_1PE[0] > 0, mean_1PE[0], old_PE.double()).float()
        # W entries without tiles: the W tiles of the group with the largest errors.
        empty_GK = (mass_1PE[0].amax(1) == 0).unflatten(0, (num_groups, num_entries))
        for g in empty_GK.any(1).nonzero()[:, 0].tolist():
            own_N = self._tiles_of(g)
            gap_NE = self.x_NE[own_N] - old_PE[self.place_N[own_N]]
            empty_W = empty_GK[g].nonzero()[: len(own_N), 0]
            worst_W = (self.weight_NE[own_N] * gap_NE**2).sum(1).topk(len(empty_W)).indices
            new_PE[g * num_entries + empty_W] = self.x_NE[own_N[worst_W]]
        self.entries_GKE = new_PE.unflatten(0, (num_groups, num_entries))

    def move_codes(self, num: int) -> None:
        """Tiles move to the best of the `num` entries of their codebook next to their own."""
        self.place_N, _ = self._best(_neighbours(self.entries_GKE, num))

    def choose_groups(self, num: int) -> None:
        """Rows move to the best codebook, their tiles to the best entries next to their own."""
        # For each codebook: the entries nearest to every present one, the best of them for each
        # tile, and the error of each row with these.
        num_entries = self.entries_GKE.shape[1]
        table_PE = self.entries_GKE.flatten(0, 1)
        places, errors = [], []
        for g, entries_KE in enumerate(self.entries_GKE):
            near_PV = g * num_entries + nearest_entry(table_PE, entries_KE, min(num, num_entries))
            place_N, cost_N = self._best(near_PV)
            places.append(place_N.unflatten(0, (-1, self.num_cols)))
            errors.append(cost_N.unflatten(0, (-1, self.num_cols)).sum(1))
        self.group_I = torch.stack(errors).argmin(0)
        rows_I = torch.arange(len(self.group_I), device=self.group_I.device)
        self.place_N = torch.stack(places)[self.group_I, rows_I].flatten()

    def _best(self, near_PV: Tensor) -> tuple[Tensor, Tensor]:
        """The best place of each tile among the places [P, V] near its own, and its weighted
        squared error there minus that of a zero: [N] each."""
        # w (x − c)² − w x² = −2 (w x) c + w c²: a product of features of the tile and of the entry.
        table_PE = self.entries_GKE.flatten(0, 1)
        squares = table_PE**2
        if self.weight_NE.shape[1] == 1:
            squares = squares.sum(1, keepdim=True)
        features_PVF = torch.cat((-2 * table_PE, squares), 1)[near_PV]
        places, costs = [], []
        size = max(1, _MAX_NUMBERS // features_PVF[0].numel())
        for x, weight, place in zip(
            self.x_NE.split(size), self.weight_NE.split(size), self.place_N.split(size)
        ):
            features_NF1 = torch.cat((weight * x, weight), 1)[..., None]
            cost_NV = (features_PVF[place] @ features_NF1)[..., 0]
            cost_N1, which_N1 = cost_NV.min(1, keepdim=True)
            places.append(near_PV[place].gather(1, which_N1)[:, 0])
            costs.append(cost_N1[:, 0])
        return torch.cat(places), torch.cat(costs)


def _neighbours(entries_GKE: Tensor, num: int) -> Tensor:
    """Places [P, V] of the `num` entries nearest to each entry in its codebook, itself first."""
    num_entries = entries_GKE.shape[1]
    return torch.cat(
        [
            g * num_entries + nearest_entry(entries_KE, entries_KE, min(num, num_entries))
            for g, entries_KE in enumerate(entries_GKE)
        ]
    )


def _storable(scale_I: Tensor) -> Tensor:
    return scale_I.detach().clamp(reference.SMALLEST_SCALE, reference.LARGEST_SCALE).bfloat16()


def _by_tile(weight_IJE: Tensor | None, X_IJE: Tensor) -> Tensor:
    """Weights of the elements, expanded to [I, J, E], or of the tiles [I, J, 1] where equal."""
    if weight_IJE is None:
        return torch.ones_like(X_IJE[:1, :1, :1]).expand(*X_IJE.shape[:2], 1)
    if bool((weight_IJE == weight_IJE[..., :1]).all()):
        weight_IJE = weight_IJE[..., :1]
    return weight_IJE.float().expand(*X_IJE.shape[:2], weight_IJE.shape[-1])


def _row_mean(values_IJE: Tensor, weight_IJE: Tensor) -> Tensor:
    """Weighted mean of each row, float32 [I]."""
    total_I = (weight_IJE * values_IJE).sum((1, 2), dtype=torch.float64)
    weight_I = weight_IJE.expand_as(values_IJE).sum((1, 2), dtype=torch.float64)
    return (total_I / weight_I.clamp(min=_TINY)).float()


def _equal_parts(values_I: Tensor, num: int) -> Tensor:
    """The number of the part, of `num` equal ones, that each value is in when they are sorted."""
    part_I = torch.empty(len(values_I), dtype=torch.int64, device=values_I.device)
    part_I[values_I.argsort(stable=True)] = (
        torch.arange(len(values_I), device=values_I.device) * num // len(values_I)
    )
    return part_I
