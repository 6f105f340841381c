"""Additive quantization: a tile is the sum of one entry from each of several learned codebooks.

The codebooks are learned together. They start as those of residual quantization, where each is
fitted to the residual of the ones before it. Then codes and codebooks are improved in turn:

    codes       a beam search over the codebooks; its code replaces that of a tile if it is better
    codebooks   the least squares of the weighted errors, with the codes as they are

The normal equations of the second step couple entries of different codebooks by the number of tiles
that have both. They are solved by sweeps: each codebook in turn becomes the means of the residuals
of all others. Codes of different codebooks are nearly independent, apart from constants that move
from one codebook to another and change nothing. So after two sweeps the error is 1e-6 above the
solution's, after one 1e-4, from 2e-2.

Mean squared error of 2^20 unit Gaussian weights in tiles of 8 with 256 entries a codebook, seconds
to fit and 10^6 weights coded a second, of one core's time; residual is the codec of k-means stages:

    codebooks   bits   residual: beam 1   beam 8   additive: beam 4   beam 8           beam 16
    2           2                0.1019   0.0939             0.0911   0.0891  12  1.6  0.0882
    3           3                0.0340   0.0278             0.0266   0.0251  23  0.7  0.0243
    4           4                0.0117   0.0084                      0.0076  37  0.4

Storage is that of a sum of tables (residual-v1 of lut-v1). A scale for each row, which AQLM has, is
left to a transform.

Source: Babenko and Lempitsky, "Additive quantization for extreme vector compression", CVPR 2014;
Martinez et al., "LSQ++", ECCV 2018 (sums of codebooks by least squares); AQLM, arXiv 2401.06118.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vqllm.codecs import lloyd
from vqllm.codecs.base import CODECS, check_finite, weigh
from vqllm.codecs.kmeans import ClusteredCodec, narrowed
from vqllm.core.protocols import Point, State
from vqllm_kernels.bitpack import pack_bits, unpack_bits
from vqllm_kernels.lut.spec import LutSpec
from vqllm_kernels.residual.reference import stage_tensors
from vqllm_kernels.residual.spec import ResidualSpec

_MOST_SCORES = 1 << 19
"""Scores of sums in memory at a time, 2 MB. With 32 MB, more than a cache has, a search takes three
times as long."""
_MOST_SCORES_GPU = 1 << 26
"""The same on a GPU, 256 MB: a launch costs more than its work on 2 MB."""
_RUN = 8
"""Scores in a run: the least scores of a row are in the runs of the least minima. Finding 8 of 2048
this way takes a third of the time that torch.topk does."""
_SWEEPS = 2
_LEAST_GAIN = 1e-3
"""Fitting ends when a round lowers the error by less than this share of it."""


def _point(codebooks: int, mse: float) -> Point:
    return Point(
        label=f"{codebooks} codebooks 1x8, 256 entries",
        options={"codebooks": codebooks, "iterations": 8, "rounds": 4},
        mse=mse,
        source="measured",
        quick=False,
    )


@CODECS.register("additive")
class Additive(ClusteredCodec):
    """Codebooks learned together for each matrix, stored in float16; their entries are added."""

    exact: ClassVar[bool] = False

    points: ClassVar[tuple[Point, ...]] = (_point(2, mse=0.0909), _point(3, mse=0.0262))

    type: Literal["additive"] = "additive"
    codebooks: int = Field(2, ge=2, le=16, description="entries that are added, one of each")
    tile_cols: int = Field(8, ge=1, le=64, description="columns of W in a tile")
    beam: int = Field(
        8, ge=1, le=64, description="partial sums kept while searching for the code of a tile"
    )
    rounds: int = Field(
        10, ge=0, description="improvements of all codes and codebooks together, at most"
    )

    @property
    def num_symbols(self) -> int:
        return self.codebooks

    def spec(self) -> ResidualSpec:
        stage = LutSpec(
            tile_rows=self.tile_rows, tile_cols=self.tile_cols, index_bits=self.index_bits
        )
        return ResidualSpec(stages=(stage,) * self.codebooks)

    def fit(self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator) -> State:
        """`s{m}_codebook` float16 [2^index_bits, E] of each codebook m."""
        check_finite(X_IJE, self)
        x_NE, weight_NE = self._drawn(X_IJE, weight_IJE, generator)
        tables, codes_NM = self._start(x_NE, weight_NE, generator)
        error = _mean(_errors(x_NE, weight_NE, tables, codes_NM))
        # Codebooks for the codes, then codes for the codebooks; at the end once more codebooks.
        for _ in range(self.rounds):
            tables = _least_squares(x_NE, weight_NE, tables, codes_NM)
            codes_NM = self._improved(x_NE, weight_NE, tables, codes_NM)
            previous, error = error, _mean(_errors(x_NE, weight_NE, tables, codes_NM))
            if error >= (1 - _LEAST_GAIN) * previous:
                break
        tables = _least_squares(x_NE, weight_NE, tables, codes_NM)
        return {f"s{m}_codebook": self.half(table_KE) for m, table_KE in enumerate(tables)}

    def _drawn(
        self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """The tiles to fit, [N, E], and their weights [N, 1], or [N, E] where elements differ."""
        x_NE, weight_NE = X_IJE.flatten(0, 1).float(), None
        if weight_IJE is not None:
            weight_IJE = narrowed(weight_IJE).float()
            weight_NE = weight_IJE.expand(*X_IJE.shape[:2], -1).flatten(0, 1)
        if len(x_NE) <= self.largest_sample:
            return x_NE, weight_NE
        drawn = lloyd.draw(len(x_NE), self.largest_sample, generator).to(x_NE.device)
        return x_NE[drawn], None if weight_NE is None else weight_NE[drawn]

    def _start(
        self, x_NE: Tensor, weight_NE: Tensor | None, generator: torch.Generator
    ) -> tuple[list[Tensor], Tensor]:
        """Tables of residual quantization and its greedy codes [N, M]."""
        weight_1NE = None if weight_NE is None else weight_NE[None]
        tables, codes, rest_NE = [], [], x_NE
        for _ in range(self.codebooks):
            table_KE = self.cluster(rest_NE[None], weight_1NE, generator)[0]
            tables.append(table_KE)
            codes.append(lloyd.assign(rest_NE[None], weight_1NE, table_KE[None])[0])
            rest_NE = rest_NE - table_KE[codes[-1]]
        return tables, torch.stack(codes, 1)

    def _improved(
        self, x_NE: Tensor, weight_NE: Tensor | None, tables: list[Tensor], codes_NM: Tensor
    ) -> Tensor:
        new_NM = _search(x_NE, tables, self.beam, 1, weight_NE)[:, 0]
        new_N = _errors(x_NE, weight_NE, tables, new_NM)
        better_N = new_N < _errors(x_NE, weight_NE, tables, codes_NM)
        return torch.where(better_N[:, None], new_NM, codes_NM)

    def _tables(self, state: State) -> list[Tensor]:
        return [state[f"s{m}_codebook"].float() for m in range(self.codebooks)]

    def encode(
        self, X_IJE: Tensor, state: State, col: int = 0, weight_E: Tensor | None = None
    ) -> Tensor:
        return self.shortlist(X_IJE, state, 1, weight_E)[:, :, 0]

    @property
    def lists_codes(self) -> bool:
        return True

    def shortlist(
        self, X_IJE: Tensor, state: State, num: int, weight_E: Tensor | None = None
    ) -> Tensor:
        check_finite(X_IJE, self)
        x_NE, tables = X_IJE.flatten(0, 1).float(), self._tables(state)
        if weight_E is not None:
            x_NE, tables = weigh(x_NE, weight_E), [weigh(table, weight_E) for table in tables]
        codes_NKM = _search(x_NE, tables, max(self.beam, num), num)
        return codes_NKM.to(torch.int32).unflatten(0, X_IJE.shape[:2])

    def decode(self, codes_IJM: Tensor, state: State, col: int = 0) -> Tensor:
        codes = codes_IJM.unbind(2)
        words = [torch.nn.functional.embedding(c, t) for c, t in zip(codes, self._tables(state))]
        X_IJE = words[0]
        for word_IJE in words[1:]:
            X_IJE = X_IJE + word_IJE
        return X_IJE

    def pack(self, codes_IJM: Tensor, state: State) -> dict[str, Tensor]:
        codes = codes_IJM.unbind(2)
        return {f"s{m}_codes": pack_bits(c, self.index_bits) for m, c in enumerate(codes)} | state

    def unpack(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Tensor, State]:
        _, num_tile_cols = self.spec().grid(rows, cols)
        stages = [stage_tensors(tensors, m) for m in range(self.codebooks)]
        codes = [unpack_bits(own["codes"], self.index_bits, num_tile_cols) for own in stages]
        state = {f"s{m}_codebook": own["codebook"] for m, own in enumerate(stages)}
        return torch.stack(codes, -1), state


def _sum(tables: list[Tensor], codes_NM: Tensor) -> Tensor:
    """The sums of the entries, [N, E]."""
    total_NE = tables[0][codes_NM[:, 0]]
    for m, table_KE in enumerate(tables[1:], start=1):
        total_NE = total_NE + table_KE[codes_NM[:, m]]
    return total_NE


def _errors(
    x_NE: Tensor, weight_NE: Tensor | None, tables: list[Tensor], codes_NM: Tensor
) -> Tensor:
    """The (weighted) squared error of each tile, [N]."""
    error_NE = (x_NE - _sum(tables, codes_NM)) ** 2
    return (error_NE if weight_NE is None else weight_NE * error_NE).sum(1)


def _mean(values_N: Tensor) -> float:
    """The same bytes with any number of threads."""
    everything_1N = torch.zeros(1, len(values_N), dtype=torch.int64)
    return float(lloyd.means(values_N[None, :, None], None, everything_1N, 1)[0])


def _least_squares(
    x_NE: Tensor, weight_NE: Tensor | None, tables: list[Tensor], codes_NM: Tensor
) -> list[Tensor]:
    """Tables nearer to those of the least (weighted) squared error for given codes.

    Entries that no tile has do not change.
    """
    # Without codebook m the residual is rest + its entries; its best entries are the means of that.
    tables = list(tables)
    rest_NE = x_NE - _sum(tables, codes_NM)
    for m in list(range(len(tables))) * _SWEEPS:
        code_N, table_KE = codes_NM[:, m], tables[m]
        rest_NE = rest_NE + table_KE[code_N]
        weight_1NE = None if weight_NE is None else weight_NE[None]
        mean_1KE, mass_1KE = lloyd.means(rest_NE[None], weight_1NE, code_N[None], len(table_KE))
        tables[m] = torch.where(mass_1KE > 0, mean_1KE, table_KE.double())[0].float()
        rest_NE = rest_NE - tables[m][code_N]
    return tables


def _search(
    x_NE: Tensor, tables: list[Tensor], beam: int, num: int, weight_NE: Tensor | None = None
) -> Tensor:
    """The best sums of a search with `beam` partial sums (B) after each table: int64 [N, K, M].

    Args:
        x_NE: vectors.
        tables: entries [K, E] of each codebook.
        num: how many sums of each vector are returned, K <= num, the best first.
        weight_NE: weights of the squared errors of each vector by element, or [N, 1] or None, which
            are the same to a search.
    """
    # Distances from common centres: otherwise the rounding of |c|² − 2 x·c hides them.
    centers = [(table.amin(0) + table.amax(0)) / 2 for table in tables]
    x_NE = x_NE - torch.stack(centers).sum(0)
    tables = [table - center for table, center in zip(tables, centers)]
    if weight_NE is not None and weight_NE.shape[1] == 1:
        weight_NE = None
    most = _MOST_SCORES_GPU if x_NE.is_cuda else _MOST_SCORES
    size = max(1, most // (beam * len(tables[0])))
    weights = [None] * -(-len(x_NE) // size) if weight_NE is None else weight_NE.split(size)
    chunks = zip(x_NE.split(size), weights)
    return torch.cat([_search_chunk(x, tables, beam, num, weight) for x, weight in chunks])


def _search_chunk(
    x_NE: Tensor, tables: list[Tensor], beam: int, num: int, weight_NE: Tensor | None
) -> Tensor:
    # `rest` is the vector minus a partial sum. Of all sums that are one entry longer, those of
    # least error go on, whichever partial sum they continue.
    rest_NBE = x_NE[:, None]
    codes_NBM = torch.empty(len(x_NE), 1, 0, dtype=torch.int64, device=x_NE.device)
    for m, table_KE in enumerate(tables):
        last = m == len(tables) - 1
        score_NBK = _scores(rest_NBE, table_KE, weight_NE)
        sum_NB, code_NB = _least(score_NBK, num if last else beam)
        rest_NBE, codes_NBM = _taken(rest_NBE, sum_NB), _taken(codes_NBM, sum_NB)
        codes_NBM = torch.cat((codes_NBM, code_NB[..., None]), 2)
        if not last:
            rest_NBE = rest_NBE - table_KE[code_NB]
    return codes_NBM


def _scores(rest_NBE: Tensor, table_KE: Tensor, weight_NE: Tensor | None) -> Tensor:
    """(Weighted) squared errors of all sums one entry longer, [N, B, K]."""
    # w (r − c)² = w r² − 2 (w r) c + w c²: a product of features of the rests and of the entries.
    # Without weights c² is one number for each entry. With a single partial sum w r² is the same
    # for all and left out.
    if weight_NE is None:
        norm_K, features_KF, features_NBF = (table_KE**2).sum(1), -2 * table_KE, rest_NBE
        own_NB = (rest_NBE**2).sum(2)
    else:
        norm_K = table_KE.new_zeros(len(table_KE))
        features_KF = torch.cat((-2 * table_KE, table_KE**2), 1)
        weighted_NBE = weight_NE[:, None] * rest_NBE
        features_NBF = torch.cat((weighted_NBE, weight_NE[:, None].expand_as(rest_NBE)), 2)
        own_NB = (weighted_NBE * rest_NBE).sum(2)
    score_NK = torch.addmm(norm_K, features_NBF.flatten(0, 1), features_KF.T)
    score_NBK = score_NK.unflatten(0, rest_NBE.shape[:2])
    return score_NBK.add_(own_NB[..., None]) if rest_NBE.shape[1] > 1 else score_NBK


def _least(score_NBK: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """B and K of the `num` least of each N, ascending: two int64 [N, num]."""
    num_codes = score_NBK.shape[2]
    if num == 1:
        # The minimum of each partial sum alone: torch.argmin takes five times as long as amin.
        best_N1 = score_NBK.amin(2).argmin(1, keepdim=True)
        return best_N1, _taken(score_NBK, best_N1)[:, 0].argmin(1, keepdim=True)
    score_NS = score_NBK.flatten(1)
    num = min(num, score_NS.shape[1])
    num_runs = score_NS.shape[1] // _RUN
    if score_NS.shape[1] % _RUN or num_runs < 2 * num:
        place_NB = score_NS.topk(num, largest=False).indices
    else:
        # Run r holds places r, r + num_runs, ...: minima across rows of memory are fast.
        score_Nlr = score_NS.unflatten(1, (_RUN, num_runs))
        run_NB = score_Nlr.amin(1).topk(num, largest=False, sorted=False).indices
        score_NL = score_Nlr.gather(2, run_NB[:, None].expand(-1, _RUN, -1)).flatten(1)
        best_NB = score_NL.topk(num, largest=False).indices
        place_NB = best_NB // num * num_runs + run_NB.gather(1, best_NB % num)
    return place_NB // num_codes, place_NB % num_codes


def _taken(values_NBX: Tensor, index_NC: Tensor) -> Tensor:
    """Rows of B by index, [N, C, X]. torch.take_along_dim takes twice as long as gather."""
    return values_NBX.gather(1, index_NC[..., None].expand(-1, -1, values_NBX.shape[2]))
