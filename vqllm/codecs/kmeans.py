"""Vector quantization with a learned codebook: each tile is one of 2^index_bits entries.

Tiles lie along a row, (1, d) as in GPTVQ, or along a column, (v, 1) as in VPTQ. The codebook
minimises the squared error, weighted by the importance that `fit` is given (Lloyd's algorithm).
There is no weight scale: a transform can bring the rows of a matrix to one scale.

A pass over 2^20 tiles of 8 weights with 65536 entries takes 113 s of one core and 220 MB beside the
tiles, and 72,000 weights a second are coded: such a codebook is slow on a CPU.

Source: VPTQ, arXiv 2409.17066; GPTVQ, arXiv 2402.15319.
"""

from abc import ABC
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vqllm.codecs import lloyd
from vqllm.codecs.base import CODECS, SearchableCodec, check_finite, nearest_entry, weigh
from vqllm.codecs.entries import apart, distinct
from vqllm.core.protocols import Codec, Point, State
from vqllm.errors import NumericalError, RecipeError
from vqllm_kernels.bitpack import MAX_WIDTH, pack_bits, unpack_bits
from vqllm_kernels.lut.spec import LutSpec

_SAMPLE = 1 << 17
_SAMPLE_PER_ENTRY = 16
"""Default of `sample`: never fewer tiles than 131072, nor than 16 for each entry."""

_MAX = "Lloyd-Max: Max, IRE Trans. Inform. Theory 6 (1960), table I"
_PALETTE = "Q-Palette, arXiv 2509.20214"


def _point(tile_cols: int, index_bits: int, mse: float, source: str, **options: int) -> Point:
    return Point(
        label=f"k-means 1x{tile_cols}, {1 << index_bits} entries",
        options={"tile_cols": tile_cols, "index_bits": index_bits, **options},
        mse=mse,
        source=source,
        num_weights=1 << (18 if (tile_cols, index_bits) == (4, 12) else 20),
        quick=False,
    )


class ClusteredCodec(Codec, ABC):
    """The options of a fit by Lloyd's algorithm."""

    weighted: ClassVar[bool] = True

    tile_rows: int = Field(1, ge=1, le=64, description="rows of W in a tile")
    tile_cols: int = Field(2, ge=1, le=64, description="columns of W in a tile")
    index_bits: int = Field(
        8, ge=1, le=MAX_WIDTH, description="bits of an index; a codebook has 2^index_bits entries"
    )
    init: lloyd.Init = Field(
        "auto",
        description="codebook before the first pass: tiles drawn far from each other (kmeans++), "
        "tiles at evenly spaced ranks of their Mahalanobis distance from the mean (mahalanobis); "
        f"auto is kmeans++ up to {lloyd.PLUS_PLUS_ENTRIES} entries, spread random tiles above, "
        "and evenly spaced ranks of single weights",
    )
    iterations: int = Field(25, ge=1, description="passes of Lloyd's algorithm, at most")
    sample: int | None = Field(
        None,
        ge=1,
        description="tiles a codebook is fitted on, at most, drawn at random; null is "
        f"{_SAMPLE}, or {_SAMPLE_PER_ENTRY} for each entry where that is more",
    )

    @model_validator(mode="after")
    def _start_is_affordable(self) -> "ClusteredCodec":
        limit = lloyd.PLUS_PLUS_ENTRIES
        if self.init == "kmeans++" and self.num_entries > limit:
            raise RecipeError(
                f"codec {self.type}: init kmeans++ with {self.num_entries} entries; it is for "
                f"{limit} at most (index_bits {limit.bit_length() - 1}). Use auto or mahalanobis"
            )
        return self

    @property
    def tile(self) -> tuple[int, int]:
        return (self.tile_rows, self.tile_cols)

    @property
    def num_entries(self) -> int:
        return 1 << self.index_bits

    @property
    def largest_sample(self) -> int:
        return self.sample or max(_SAMPLE, _SAMPLE_PER_ENTRY * self.num_entries)

    def cluster(
        self, x_GNE: Tensor, weight_GNE: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        """A codebook for each group, float32 [G, K, E], of a sample of its vectors."""
        num_vectors = x_GNE.shape[1]
        if num_vectors > self.largest_sample:
            drawn = lloyd.draw(num_vectors, self.largest_sample, generator).to(x_GNE.device)
            x_GNE = x_GNE[:, drawn]
            weight_GNE = None if weight_GNE is None else weight_GNE[:, drawn]
        entries_GKE = lloyd.start(x_GNE, weight_GNE, self.num_entries, self.init, generator)
        return lloyd.lloyd(x_GNE, weight_GNE, entries_GKE, self.iterations)

    def half(self, entries: Tensor) -> Tensor:
        """Tables [.., K, E] as they are stored in float16, all of whose entries differ."""
        if entries.abs().max() > torch.finfo(torch.float16).max:
            raise NumericalError(
                f"codec {self.type}: weights up to {float(entries.abs().max()):.3g} do not fit a "
                "float16 codebook (65504). Scale the weights down with a scaling transform."
            )
        return distinct(entries.half())

    def project(self, state: State) -> State:
        projected = super().project(state)
        return {
            name: apart(tensor) if tensor.dtype == torch.float16 and "codebook" in name else tensor
            for name, tensor in projected.items()
        }


@CODECS.register("kmeans")
class KMeans(ClusteredCodec, SearchableCodec):
    """A codebook learned for each matrix, stored in float16.

    A matrix with fewer distinct tiles than the codebook has entries is coded without loss (but for
    the rounding to float16); the other entries lie beyond its tiles.
    """

    weighs_candidates: ClassVar[bool] = True

    points: ClassVar[tuple[Point, ...]] = (
        _point(1, 2, 0.1175, _MAX),
        _point(1, 3, 0.0345, _MAX),
        _point(1, 4, 0.0095, _MAX),
        _point(2, 3, 0.2012, _PALETTE),
        _point(2, 4, 0.1086, _PALETTE),
        _point(2, 5, 0.0571, _PALETTE),
        _point(2, 6, 0.0297, _PALETTE),
        _point(2, 7, 0.0152, _PALETTE, iterations=60),
        _point(2, 8, 0.00776, _PALETTE, iterations=40),
        _point(4, 8, 0.0989, "measured", sample=1 << 16),
        _point(4, 12, 0.0273, "measured", iterations=4, sample=1 << 15),
        _point(6, 12, 0.0943, "8 passes of k-means", iterations=8),
    )

    type: Literal["kmeans"] = "kmeans"

    def spec(self) -> LutSpec:
        return LutSpec(
            tile_rows=self.tile_rows, tile_cols=self.tile_cols, index_bits=self.index_bits
        )

    def fit(self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator) -> State:
        """`codebook` float16 [2^index_bits, E]."""
        check_finite(X_IJE, self)
        x_1NE = X_IJE.flatten(0, 1)[None].float()
        weight_1NE = None
        if weight_IJE is not None:
            weight_IJE = narrowed(weight_IJE)
            shape = (*X_IJE.shape[:2], weight_IJE.shape[-1])
            weight_1NE = weight_IJE.float().expand(shape).flatten(0, 1)[None]
        return {"codebook": self.half(self.cluster(x_1NE, weight_1NE, generator)[0])}

    def encode(
        self, X_IJE: Tensor, state: State, col: int = 0, weight_E: Tensor | None = None
    ) -> Tensor:
        return self.candidates(X_IJE, state, 1, weight_E)

    def candidates(
        self, X_IJE: Tensor, state: State, num: int, weight_E: Tensor | None = None
    ) -> Tensor:
        check_finite(X_IJE, self)
        x_NE, table_KE = X_IJE.flatten(0, 1).float(), state["codebook"].float()
        if weight_E is not None:
            x_NE, table_KE = weigh(x_NE, weight_E), weigh(table_KE, weight_E)
        index_NK = nearest_entry(x_NE, table_KE, min(num, len(table_KE)))
        return index_NK.to(torch.int32).unflatten(0, X_IJE.shape[:2])

    def decode(self, codes_IJM: Tensor, state: State, col: int = 0) -> Tensor:
        index_IJ = codes_IJM[..., 0] & (self.num_entries - 1)
        return torch.nn.functional.embedding(index_IJ, state["codebook"].float())

    def pack(self, codes_IJM: Tensor, state: State) -> dict[str, Tensor]:
        return {"codes": pack_bits(codes_IJM[..., 0], self.index_bits), **state}

    def unpack(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Tensor, State]:
        _, num_tile_cols = self.spec().grid(rows, cols)
        codes_IJM = unpack_bits(tensors["codes"], self.index_bits, num_tile_cols)[..., None]
        return codes_IJM, {"codebook": tensors["codebook"]}


def narrowed(weight_IJE: Tensor) -> Tensor:
    """Weights as [..., 1] if the elements of each tile have one weight: its nearest entry is then
    that of the Euclidean distance."""
    one = bool((weight_IJE == weight_IJE[..., :1]).all())
    return weight_IJE[..., :1] if one else weight_IJE
