"""Overlapping windows of bits: four weights of a row are four windows of one integer of 15 bits.

The integer is a linear function of the code, of 8 bits, so the decoder needs no table: a product,
four shifts, four masks. A row chooses its linear function from a short list by the error that it
leaves (the "code cluster" of the paper), and has a scale; groups of columns have a scale of 4 bits
in units of it. The bits are in `vqllm_kernels.convolutional.reference`.

The function decides where the 256 points are, and nothing else can be chosen: points of even
density in a cube, 0.1091 at best at 2 bits, against 0.1027 for the 256 points of D4 nearest to the
origin and 0.0989 for a learned table. Levels that are spaced wider outwards (cubic) reach 0.1037
for two more multiplications a weight.

More bits for the same windows give the rates up to 2.75. The hybrid encodings of the paper's 2.5
and 2.75 bits spend bits on windows alone: 8 bits on 3 weights, windows of 4 bits at shift 2, 0.0837
at 2.67 bits. A linear function of 10 bits with the windows of the 2-bit code has 0.0631 at 2.5.

A choice of 8 maps is worth 1.5 % with rows of 4096 weights, 4 % with rows of 512; half of it is
left after LDLQ. Group scales are worth another 3 % on Gaussian weights and cost 0.06 bits, which as
bits of the codes would be worth 8 %; on weights that no Hadamard transform has evened out they are
worth 4 to 13 %.

Source: CCQ, arXiv 2507.07145; for the bits, the decoders WINT2 and WINT2.5 of FastDeploy and
WINT2.75 of PaddleNLP. How its encoder finds maps and scales is not published; this one is ours.
"""

from functools import lru_cache
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vqllm.codecs.base import CODECS, MIN_SCALE, check_finite, nearest_entry, weigh
from vqllm.codecs.convolutional_maps import KNOWN, Constants
from vqllm.core.protocols import Codec, Point, State
from vqllm.errors import RecipeError
from vqllm_kernels.bitpack import pack_bits, unpack_bits
from vqllm_kernels.convolutional import reference
from vqllm_kernels.convolutional.spec import ConvolutionalSpec

_MAX_WEIGHTS = 1 << 20
"""Weights that are fitted at a time; rows are fitted alone."""
_MAX_SCALE = (1 << reference.SCALE_BITS) - 1
_STEPS = (0, -1, 1)
"""Steps from the group scale that the size of the weights suggests to those that are tried."""
_FIRST_SCALE = _MAX_SCALE - 1
"""Group scale that the largest group of a row starts with: a step up is left, worth 0.3 %."""
_MEASURED = "measured; 0.1134 is the best of 2500 random maps"


def _point(
    index_bits: int, levels: str, mse: float, source: str = "measured", **options: int | None
) -> Point:
    shift = 3 if levels == "linear" else 4
    constants = {"index_bits": index_bits, "shift": shift, "levels": levels}
    whole = {"group": None, "maps": 1, **options}
    return Point(
        label=f"{index_bits} bits for 4, {levels}, {'groups' if whole['group'] else 'whole rows'}",
        options={**constants, **whole},
        mse=mse,
        source=source,
        quick=False,
    )


@CODECS.register("convolutional")
class Convolutional(Codec):
    """A few consecutive weights in one code that is decoded without a table."""

    weighted: ClassVar[bool] = True

    points: ClassVar[tuple[Point, ...]] = (
        _point(8, "linear", 0.1091, _MEASURED),
        _point(8, "linear", 0.1041, _MEASURED, group=64, maps=8),
        _point(9, "linear", 0.0849),
        _point(10, "linear", 0.0631),
        _point(11, "linear", 0.0464),
        _point(8, "cubic", 0.1037),
        _point(9, "cubic", 0.0745),
        _point(10, "cubic", 0.0546),
        _point(11, "cubic", 0.0404),
        Point(
            label="8 bits for 3, windows of 4 at shift 2, whole rows",
            options={"tile_cols": 3, "window": 4, "shift": 2, "group": None, "maps": 1},
            mse=0.0837,
            source="the paper's 2.75 bits, measured",
            quick=False,
        ),
    )

    type: Literal["convolutional"] = "convolutional"
    index_bits: int = Field(8, description="bits of a code")
    tile_cols: int = Field(4, description="weights that a code stands for")
    window: int = Field(6, description="bits of a weight")
    shift: int = Field(
        3, description="bits between the windows of two weights; window - shift bits are shared"
    )
    levels: Literal["linear", "cubic"] = Field(
        "linear",
        description="spacing of the values of a window: even, as in the paper, or wider outwards, "
        "which suits Gaussian weights better",
    )
    group: int | None = Field(
        64, ge=1, description="columns of a row that share a scale of 4 bits; null is the whole row"
    )
    maps: int = Field(
        4,
        ge=1,
        le=8,
        description="linear functions from codes to bits that a row chooses from; fitting time "
        "grows with it",
    )

    @model_validator(mode="after")
    def _constants_fit(self) -> "Convolutional":
        if self._constants not in KNOWN:
            raise RecipeError(
                f"codec convolutional: {self._constants}; known are " + "; ".join(map(str, KNOWN))
            )
        if self.group is not None and self.group % self.tile_cols:
            below = self.group - self.group % self.tile_cols
            raise RecipeError(
                f"codec convolutional: group {self.group} is not a multiple of tile_cols "
                f"{self.tile_cols}; use {max(below, self.tile_cols)} or null"
            )
        return self

    @property
    def _constants(self) -> Constants:
        return Constants(self.index_bits, self.tile_cols, self.window, self.shift, self.levels)

    @property
    def _group_tiles(self) -> int | None:
        return self.group // self.tile_cols if self.group else None

    @property
    def tile(self) -> tuple[int, int]:
        return (1, self.tile_cols)

    def spec(self) -> ConvolutionalSpec:
        return ConvolutionalSpec(**self._constants._asdict(), group=self.group)

    def fit(self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator) -> State:
        """`code_map` int32 [I, 2], `group_scale` uint8 [I, G] and `super_scale` float32 [I]."""
        check_finite(X_IJE, self)
        rows = max(1, _MAX_WEIGHTS // X_IJE[0].numel())
        parts = X_IJE.float().split(rows)
        weights = [None] * len(parts)
        if weight_IJE is not None:
            weights = weight_IJE.float().expand_as(X_IJE).split(rows)
        states = [self._fit_rows(X, weight) for X, weight in zip(parts, weights)]
        return {name: torch.cat([state[name] for state in states]) for name in states[0]}

    def _fit_rows(self, X_IJE: Tensor, weight_IJE: Tensor | None) -> State:
        """The scales with the first map, then the map of each row."""
        size_I = X_IJE.abs().amax((1, 2)).clamp(min=MIN_SCALE)
        X_IJE = X_IJE / size_I[:, None, None]  # squares of any weights are in range
        state = self._start(X_IJE, weight_IJE)
        # For each group the scale by its size, one step lower and one higher are tried; the one of
        # least error stays.
        steps = []
        for step in _STEPS:
            moved_IG = (state["group_scale"].int() + step).clamp(0, _MAX_SCALE).to(torch.uint8)
            steps.append({**state, "group_scale": moved_IG})
        errors = [self._by_group(self._error(X_IJE, weight_IJE, s)) for s in steps]
        best_IG = torch.stack(errors).argmin(0)
        scale_SIG = torch.stack([s["group_scale"] for s in steps])
        state["group_scale"] = scale_SIG.take_along_dim(best_IG[None], 0)[0]
        state = self._choose_maps(X_IJE, weight_IJE, state)
        return {**state, "super_scale": state["super_scale"] * size_I}

    def _start(self, X_IJE: Tensor, weight_IJE: Tensor | None) -> State:
        """The first map, and the scales that are best for Gaussian weights."""
        # A group's scale is proportional to its root mean square. It is rounded in units of the
        # super scale, in which the largest one of the row is _FIRST_SCALE.
        known = KNOWN[self._constants]
        weight_IJE = torch.ones_like(X_IJE) if weight_IJE is None else weight_IJE
        square_IG = self._by_group((weight_IJE * X_IJE**2).sum(2))
        mass_IG = self._by_group(weight_IJE.sum(2))
        scale_IG = known.unit * (square_IG / mass_IG.clamp(min=MIN_SCALE)).sqrt()
        super_I = (scale_IG.amax(1) / _FIRST_SCALE).clamp(min=MIN_SCALE)
        code_map_2 = torch.tensor(known.maps[0], dtype=torch.int32, device=X_IJE.device)
        return {
            "code_map": code_map_2.repeat(len(X_IJE), 1),
            "group_scale": (scale_IG / super_I[:, None]).round().to(torch.uint8),
            "super_scale": super_I,
        }

    def _choose_maps(self, X_IJE: Tensor, weight_IJE: Tensor | None, state: State) -> State:
        """For each row the map, with the super scale that is best for its codes."""
        most_I = torch.full((len(X_IJE),), -torch.inf, device=X_IJE.device)
        best = dict(state)
        for pair in KNOWN[self._constants].maps[: self.maps]:
            code_map_2 = torch.tensor(pair, dtype=torch.int32, device=X_IJE.device)
            tried = {**state, "code_map": code_map_2.expand(len(X_IJE), 2)}
            hat_IJE = self.decode(self.encode(X_IJE, tried), tried)
            weighted_IJE = hat_IJE if weight_IJE is None else weight_IJE * hat_IJE
            match_I = (weighted_IJE * X_IJE).sum((1, 2))
            energy_I = (weighted_IJE * hat_IJE).sum((1, 2)).clamp(min=MIN_SCALE)
            # With the best multiple x·hat / hat² of hat the error is x² − (x·hat)² / hat².
            explained_I = match_I.clamp(min=0) ** 2 / energy_I
            better_I = explained_I > most_I
            factor_I = torch.where(match_I > 0, match_I / energy_I, 1)
            most_I = torch.where(better_I, explained_I, most_I)
            best["code_map"] = torch.where(better_I[:, None], tried["code_map"], best["code_map"])
            best["super_scale"] = torch.where(
                better_I, state["super_scale"] * factor_I, best["super_scale"]
            )
        return best

    def _error(self, X_IJE: Tensor, weight_IJE: Tensor | None, state: State) -> Tensor:
        """The (weighted) squared error of each tile, [I, J]."""
        square_IJE = (self.decode(self.encode(X_IJE, state), state) - X_IJE) ** 2
        return (square_IJE if weight_IJE is None else weight_IJE * square_IJE).sum(2)

    def _by_group(self, values_IJ: Tensor) -> Tensor:
        """Sums over the tiles of each group, [I, G]."""
        tiles = self._group_tiles or values_IJ.shape[1]
        missing = -values_IJ.shape[1] % tiles
        return torch.nn.functional.pad(values_IJ, (0, missing)).unflatten(1, (-1, tiles)).sum(2)

    def encode(
        self, X_IJE: Tensor, state: State, col: int = 0, weight_E: Tensor | None = None
    ) -> Tensor:
        check_finite(X_IJE, self)
        scale_IJ = self._scales(state, col, X_IJE.shape[1])
        x_IJE = X_IJE / torch.where(scale_IJ > 0, scale_IJ, 1)[..., None]
        # Rows with the same map have the same table of points, and are searched together.
        map_P2, map_I = _distinct(state["code_map"])
        tables = [_table(*pair, self._constants, x_IJE.device) for pair in map_P2.tolist()]
        if weight_E is not None:
            x_IJE, tables = weigh(x_IJE, weight_E), weigh(torch.stack(tables), weight_E)
        codes_IJ = torch.empty(x_IJE.shape[:2], dtype=torch.int32, device=x_IJE.device)
        for p, table_KE in enumerate(tables):
            rows = (map_I == p).nonzero()[:, 0]
            codes_NJ = _nearest(x_IJE[rows].flatten(0, 1), table_KE).unflatten(0, (len(rows), -1))
            codes_IJ[rows] = codes_NJ
        return codes_IJ[..., None]

    def decode(self, codes_IJM: Tensor, state: State, col: int = 0) -> Tensor:
        codes_IJ = codes_IJM[..., 0]
        w_IJE = reference.weights(codes_IJ, state["code_map"], *self._constants[1:])
        return self._scales(state, col, codes_IJ.shape[1])[..., None] * w_IJE

    def _scales(self, state: State, col: int, num: int) -> Tensor:
        return reference.scales(
            state["group_scale"], state["super_scale"], self._group_tiles, col, num
        )

    def pack(self, codes_IJM: Tensor, state: State) -> dict[str, Tensor]:
        return {
            "codes": pack_bits(codes_IJM[..., 0], self.index_bits),
            "code_map": state["code_map"],
            "group_scale": pack_bits(state["group_scale"], reference.SCALE_BITS),
            "super_scale": state["super_scale"],
        }

    def unpack(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Tensor, State]:
        spec = self.spec()
        codes_IJ = unpack_bits(tensors["codes"], self.index_bits, spec.grid(rows, cols)[1])
        group_scale_IG = unpack_bits(
            tensors["group_scale"], reference.SCALE_BITS, spec.num_groups(cols)
        )
        state = {
            "code_map": tensors["code_map"],
            "group_scale": group_scale_IG.to(torch.uint8),
            "super_scale": tensors["super_scale"],
        }
        return codes_IJ[..., None], state


def _distinct(code_map_I2: Tensor) -> tuple[Tensor, Tensor]:
    """The different maps [P, 2], and which of them each row has [I]."""
    key_I = (code_map_I2[:, 0].to(torch.int64) << 32) | code_map_I2[:, 1]
    key_P, map_I = key_I.unique(return_inverse=True)
    return torch.stack((key_P >> 32, key_P & 0xFFFFFFFF), 1), map_I


@lru_cache(maxsize=64)
def _table(scale: int, offset: int, constants: Constants, device: torch.device) -> Tensor:
    """All w of a row with this map, float32 [2^index_bits, E]."""
    codes_1J = torch.arange(1 << constants.index_bits, dtype=torch.int32, device=device)[None]
    code_map_12 = torch.tensor([[scale, offset]], dtype=torch.int32, device=device)
    return reference.weights(codes_1J, code_map_12, *constants[1:])[0]


def _nearest(x_NE: Tensor, table_KE: Tensor) -> Tensor:
    """The index of the entry nearest to each vector, int32 [N]."""
    return nearest_entry(x_NE, table_KE)[:, 0].to(torch.int32)
