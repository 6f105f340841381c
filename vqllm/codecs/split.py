"""The first columns of a matrix coded by one codec, the rest by another.

Outlier columns, as in VPTQ: after a permutation of the input features by diag(H), the first columns
are those whose errors count most, and a codec with more bits codes them. Where the two codecs have
tiles of different size, the tile of the whole is the smallest one that whole tiles of both fill.
Its symbols are those of the tiles inside it, row by row, followed by zeros where the other codec
has more.

Source: Liu et al., "VPTQ", arXiv 2409.17066.
"""

from functools import partial
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import Tensor

from vqllm.codecs.base import CODECS, build_part, check_finite
from vqllm.core.protocols import Codec, Point, State
from vqllm.errors import RecipeError
from vqllm_kernels.split.reference import PARTS, num_columns, part_tensors, stacked, unstacked
from vqllm_kernels.split.spec import SplitSpec

_PartCodec = Annotated[SerializeAsAny[Codec], BeforeValidator(partial(build_part, "split", "part"))]


class _Inner(NamedTuple):
    """How tiles of a part lie inside a tile of the whole; converts between the two grids."""

    tile: tuple[int, int]
    """rows and columns of W in a tile of the part"""
    num: tuple[int, int]
    """rows and columns of the part's tiles in a tile of the whole"""

    def inward(self, X_IJE: Tensor) -> Tensor:
        """Tiles of the whole [I, J, E] as tiles of the part [I', J', E']."""
        (rows, cols), (num_rows, num_cols) = self.tile, self.num
        X = X_IJE.unflatten(2, (num_rows, rows, num_cols, cols)).permute(0, 2, 1, 4, 3, 5)
        return X.flatten(4, 5).flatten(2, 3).flatten(0, 1)

    def outward(self, X_IJE: Tensor) -> Tensor:
        """Inverse of `inward`."""
        num_rows, num_cols = self.num
        X = X_IJE.unflatten(2, self.tile).unflatten(1, (-1, num_cols)).unflatten(0, (-1, num_rows))
        return X.permute(0, 2, 1, 4, 3, 5).flatten(2)

    def symbols_outward(self, codes_IJM: Tensor, num_symbols: int) -> Tensor:
        """Codes of the part's tiles as symbols of tiles of the whole, filled up with zeros."""
        num_rows, num_cols = self.num
        codes = codes_IJM.unflatten(1, (-1, num_cols)).unflatten(0, (-1, num_rows))
        codes_IJM = codes.transpose(1, 2).flatten(2)
        return torch.nn.functional.pad(codes_IJM, (0, num_symbols - codes_IJM.shape[2]))

    def symbols_inward(self, codes_IJM: Tensor, num_symbols: int) -> Tensor:
        """Inverse of `symbols_outward`, `num_symbols` of them for a tile of the part."""
        num_rows, num_cols = self.num
        codes = codes_IJM[..., : num_rows * num_cols * num_symbols]
        codes = codes.unflatten(2, (num_rows, num_cols, num_symbols)).transpose(1, 2)
        return codes.flatten(2, 3).flatten(0, 1)


@CODECS.register("split")
class Split(Codec):
    """One codec for the first columns, another for the rest."""

    points: ClassVar[tuple[Point, ...]] = (
        Point(
            label="5 % in pairs, 4 bits; 4x1, 2 bits",
            options={
                "share": 0.05,
                "first": {"type": "kmeans", "tile_rows": 2, "tile_cols": 1, "index_bits": 8},
                "rest": {"type": "kmeans", "tile_rows": 4, "tile_cols": 1, "index_bits": 8},
            },
            mse=0.0943,
            source="0.05 · 0.00776 + 0.95 · 0.0989, of the parts",
            num_weights=1 << 18,
            quick=False,
        ),
    )

    type: Literal["split"] = "split"
    share: float = Field(
        0.01,
        gt=0,
        lt=1,
        description="share of the columns of tiles that the first codec codes: at least one, not "
        "all",
    )
    first: _PartCodec = Field(description="codec of the first columns")
    rest: _PartCodec = Field(description="codec of the other columns")

    @model_validator(mode="after")
    def _fitted_at_once(self) -> "Split":
        if any(part.refit_cols is not None for part in self._parts):
            raise RecipeError(
                "codec split: a part fits codebooks while columns are coded (fit per_group), which "
                "only a codec by itself can; set its fit to once"
            )
        return self

    @property
    def _parts(self) -> tuple[Codec, Codec]:
        return self.first, self.rest

    @property
    def _inner(self) -> tuple[_Inner, _Inner]:
        rows, cols = self.tile
        first, rest = (
            _Inner(part.tile, (rows // part.tile[0], cols // part.tile[1])) for part in self._parts
        )
        return first, rest

    @property
    def tile(self) -> tuple[int, int]:
        return self.spec().tile

    @property
    def num_symbols(self) -> int:
        sizes = zip(self._inner, self._parts)
        return max(inner.num[0] * inner.num[1] * part.num_symbols for inner, part in sizes)

    @property
    def weighted(self) -> bool:  # type: ignore[override]
        # Tiles that are coded one by one inside a larger one would need its weights in parts.
        return self.first.tile == self.rest.tile and all(part.weighted for part in self._parts)

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return all(part.exact for part in self._parts)

    def spec(self) -> SplitSpec:
        return SplitSpec(share=self.share, first=self.first.spec(), rest=self.rest.spec())

    def fit(self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator) -> State:
        """The states of the parts under `first_` and `rest_` + name.

        Also `num_first` int64 [1], the columns of tiles of the first part.
        """
        check_finite(X_IJE, self)
        first, _ = num_columns(self.share, X_IJE.shape[1])
        # Without a column of its own the first part is fitted to all: it has tensors to store.
        owns = slice(0, first or None), slice(first, None)
        state = {"num_first": torch.tensor([first], device=X_IJE.device)}
        for name, part, inner, own in zip(PARTS, self._parts, self._inner, owns):
            weight = None if weight_IJE is None else weight_IJE.expand_as(X_IJE)[:, own]
            x_IJE = inner.inward(X_IJE[:, own])
            fitted = part.fit(x_IJE, None if weight is None else inner.inward(weight), generator)
            state |= {f"{name}_{key}": tensor for key, tensor in fitted.items()}
        return state

    def encode(
        self, X_IJE: Tensor, state: State, col: int = 0, weight_E: Tensor | None = None
    ) -> Tensor:
        check_finite(X_IJE, self)
        if not self.weighted:
            weight_E = None
        codes = []
        for i, own, part_col in self._stretches(state, col, X_IJE.shape[1]):
            part, inner = self._parts[i], self._inner[i]
            own_state = part_tensors(state, PARTS[i])
            own_codes = part.encode(inner.inward(X_IJE[:, own]), own_state, part_col, weight_E)
            codes.append(inner.symbols_outward(own_codes, self.num_symbols))
        return torch.cat(codes, 1)

    def decode(self, codes_IJM: Tensor, state: State, col: int = 0) -> Tensor:
        tiles = []
        for i, own, part_col in self._stretches(state, col, codes_IJM.shape[1]):
            part, inner = self._parts[i], self._inner[i]
            codes = inner.symbols_inward(codes_IJM[:, own], part.num_symbols)
            decoded = part.decode(codes, part_tensors(state, PARTS[i]), part_col)
            tiles.append(inner.outward(decoded))
        return torch.cat(tiles, 1)

    def streams(self, codes_IJM: Tensor) -> list[Tensor]:
        first, _ = num_columns(self.share, codes_IJM.shape[1])
        streams = []
        for part, inner, own in zip(
            self._parts, self._inner, (codes_IJM[:, :first], codes_IJM[:, first:])
        ):
            if own.shape[1]:
                streams += part.streams(inner.symbols_inward(own, part.num_symbols))
        return streams

    def project(self, state: State) -> State:
        projected = dict(state)
        for name, part in zip(PARTS, self._parts):
            own = part.project(part_tensors(state, name))
            projected |= {f"{name}_{key}": tensor for key, tensor in own.items()}
        return projected

    def pack(self, codes_IJM: Tensor, state: State) -> dict[str, Tensor]:
        first = int(state["num_first"])
        packed = {}
        for i, own in enumerate((codes_IJM[:, :first], codes_IJM[:, first:])):
            name, part, inner = PARTS[i], self._parts[i], self._inner[i]
            # A part without a column stores one column of zeros.
            if own.shape[1] == 0:
                own = torch.zeros_like(codes_IJM[:, :1])
            codes = inner.symbols_inward(own, part.num_symbols)
            tensors = part.pack(codes, part_tensors(state, name))
            tensors = stacked(tensors, part.spec(), self.tile[0])
            packed |= {f"{name}_{key}": tensor for key, tensor in tensors.items()}
        return packed

    def unpack(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Tensor, State]:
        tile_rows, tile_cols = self.tile
        num_tile_rows, _ = self.spec().grid(rows, cols)
        nums = self.spec().num_columns(cols)
        state, codes = {}, []
        # A part without a column has stored one, which is dropped below.
        for name, part, num in zip(PARTS, self._parts, nums):
            own = unstacked(part_tensors(tensors, name), part.spec())
            size = num_tile_rows * tile_rows, max(num, 1) * tile_cols
            own_codes, own_state = part.unpack(own, *size)
            codes.append(own_codes)
            state |= {f"{name}_{key}": tensor for key, tensor in own_state.items()}
        state["num_first"] = torch.tensor(nums[:1], device=codes[0].device)
        outward = [
            inner.symbols_outward(c, self.num_symbols)[:, :num]
            for inner, c, num in zip(self._inner, codes, nums)
        ]
        return torch.cat(outward, 1), state

    def _stretches(self, state: State, col: int, num_cols: int) -> list[tuple[int, slice, int]]:
        """The parts that `num_cols` columns of tiles from `col` on belong to.

        Returns:
            for each: its number, which of the columns are its own, and the column of its own grid
            of tiles that the first of them is.
        """
        first = int(state["num_first"])
        border = min(max(first - col, 0), num_cols)
        stretches = []
        if border:
            stretches.append((0, slice(0, border), col * self._inner[0].num[1]))
        if border < num_cols:
            start = max(col - first, 0) * self._inner[1].num[1]
            stretches.append((1, slice(border, num_cols), start))
        return stretches
