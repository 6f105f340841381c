"""Trellis-coded quantization: 256 weights of a tile as a closed path through a bitshift trellis.

Every weight is a function of the last L bits of a stream, so the code has the gain of a codebook
with 2^256 entries at a search of 2^L states a weight. Nothing is stored but the path and a scale.
Made for weights that a random rotation has made Gaussian.

Source: QTIP, arXiv 2406.11235; the mul1 code: exllamav3. Rates between whole bits are reached by
steps that take different numbers of new bits, spread evenly; at 2.5 bits that costs nothing (0.77
dB above Shannon's limit with 2^12 states, between 0.67 dB at 2 bits and 0.86 dB at 3).
"""

from functools import cache, lru_cache
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from vqllm.codecs import trellis_maps, trellis_tables
from vqllm.codecs.base import CODECS, ScaledCodec, check_finite
from vqllm.codecs.search import viterbi
from vqllm.core.protocols import Point, State
from vqllm.errors import RecipeError
from vqllm_kernels.trellis import reference
from vqllm_kernels.trellis.spec import ParityTrellisSpec, TrellisSpec

_RATE_UNIT = reference.WORD / reference.WEIGHTS
"""Rates are multiples of a sixteenth of a bit: whole words of 16 bits a tile."""

PAIRS = ("mul2", "bytes2")
"""Codes whose values are sums of two bytes."""

_RATES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
_SCALES = {
    8: (0.895, 1.012, 1.070, 1.121, 1.164, 1.236, 1.310),
    12: (0.896, 0.985, 1.030, 1.067, 1.103, 1.161, 1.222),
    16: (0.883, 0.980, 1.012, 1.050, 1.076, 1.110, 1.160),
}
"""Best scale over the root mean square of Gaussian weights by state bits and rate, from parabolas
through five scales. mul1 and 3inst agree within 1 %; a scale 4 % off costs 0.3 % at 2 bits."""
_PAIR_SCALES = (0.878, 0.986, 1.050, 1.112, 1.172, 1.300, 1.300)
"""The same for sums of two bytes, whose largest values are smaller; 2^12 to 2^16 states agree
within 1 %. With the scales above they lose 0.1 % at 2 bits, 1 % at 2.5 and 3 % at 3."""

_TABLE_BITS = 9
"""Default for the hybrid code: 512 pairs, 2 KB."""

_QTIP = "QTIP, arXiv 2406.11235, tables 1 and 2"
_TABLE = "a random table: QTIP, arXiv 2406.11235, table 2"
_PALETTE = "Q-Palette, arXiv 2509.20214"
_RUN = "the code itself, on 48 tiles"


def _points(
    code: str, state_bits: int, mse: dict[float, float], source: str = "measured"
) -> list[Point]:
    return [
        Point(
            label=f"{code}, 2^{state_bits} states",
            options={"code": code, "state_bits": state_bits, "bits": bits},
            mse=figure,
            source=source,
            num_weights=1 << (20 if state_bits < 12 else 18 if state_bits < 16 else 17),
            quick=state_bits == 8 and bits in (2, 3.5),
        )
        for bits, figure in mse.items()
    ]


@CODECS.register("trellis")
class Trellis(ScaledCodec):
    """Tiles of 256 weights, 1 to 8 bits a weight in steps of a sixteenth."""

    alike: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    points: ClassVar[tuple[Point, ...]] = (
        *_points("mul1", 8, {1: 0.3085, 2: 0.0842, 3: 0.0237, 4: 0.0075}, _RUN),
        *_points("mul1", 8, {3.5: 0.0127}),
        *_points("mul1", 10, {1: 0.2916, 2: 0.0779, 3: 0.0203, 4: 0.0055}, _RUN),
        *_points("mul1", 10, {5: 0.00167}),
        *_points("mul1", 12, {1: 0.2849, 2: 0.0718, 3: 0.0188, 4: 0.0051}, _RUN),
        *_points("mul1", 12, {1.5: 0.1445, 2.5: 0.0372, 3.5: 0.00985, 4.5: 0.00265, 5: 0.00140}),
        *_points("mul1", 14, {2: 0.0712, 4: 0.0048}, _RUN),
        *_points("mul1", 14, {3: 0.0182}),
        *_points("mul1", 16, {2: 0.0703, 3: 0.0175, 4: 0.0045}, _RUN),
        *_points("3inst", 12, {1: 0.2798, 2: 0.0733, 3: 0.0195, 4: 0.0053}, _RUN),
        *_points("3inst", 16, {2: 0.0684, 3: 0.0178, 4: 0.00468}, _RUN),
        *_points("1mad", 16, {2: 0.069}, _QTIP),
        *_points("mul2", 16, {2: 0.0722}),
        *_points("bytes4", 12, {2: 0.0726, 2.5: 0.0371, 3: 0.0190, 4: 0.00498}),
        *_points("bytes4", 16, {2: 0.0692}),
        *_points("bytes2", 12, {2: 0.0751}),
        *_points("bytes2", 14, {1.5: 0.1402, 2: 0.0728}),
        *_points("bytes2", 16, {2: 0.0715}),
        *_points("hybrid", 12, {2: 0.0750}),
        *_points("hybrid", 16, {2: 0.0710, 3: 0.0189, 4: 0.00590}, _PALETTE),
        *_points("gf2", 8, {2: 0.0740, 3: 0.0197, 3.5: 0.0108, 4: 0.00527}),
        *_points("gf2", 10, {2: 0.0715, 3: 0.0186, 4: 0.00496}),
        *_points("gf2", 12, {1.5: 0.1384, 2: 0.0696, 2.5: 0.0360, 3: 0.0180, 3.5: 0.00934}),
        *_points("gf2", 12, {4: 0.00475}),
        *_points("gf2", 14, {2: 0.0687}),
        *_points("gf2", 16, {2: 0.0681}),
        *_points("table", 8, {2: 0.0795, 3: 0.0216, 4: 0.00595}),
        *_points("table", 12, {1: 0.2803, 2: 0.0733}, _TABLE),
    )

    # `bits` in a recipe; as an attribute that name is the method that counts the stored bits.
    model_config = ConfigDict(serialize_by_alias=True)

    type: Literal["trellis"] = "trellis"
    rate: float = Field(2, alias="bits", ge=1, le=8, description="bits a weight, in sixteenths")
    state_bits: int = Field(
        12,
        ge=4,
        le=16,
        description="L: the search takes time proportional to 2^L; 8 to 10 is fast, 16 the best",
    )
    code: Literal[reference.Code, "gf2"] = Field(
        "mul1",
        description="the values of the states: 1mad, mul1, 3inst, bytes4 (computed), mul2, bytes2 "
        "(computed, 2 weights a step), hybrid (a small trained table, 2 weights a step), table (a "
        "trained table of all states), gf2 (a trained table of 64 or 128 bytes, found by sums of "
        "bits of the state)",
    )
    step_weights: int | None = Field(
        None, ge=1, le=2, description="weights a step; null is what the code has, 1 for table"
    )
    table_bits: int | None = Field(
        None,
        ge=1,
        le=15,
        description=f"2^table_bits entries, of hybrid (null is {_TABLE_BITS}) or of gf2 (6 or 7; "
        "null is the better one for `bits`)",
    )
    tile_rows: int = Field(
        16, description="rows of a tile of 256 weights: a power of two up to 256"
    )

    @model_validator(mode="after")
    def _has_a_format(self) -> "Trellis":
        most = min(8, self.state_bits - 1) / self._step_weights
        if self.rate / _RATE_UNIT % 1 or self.rate > most:
            raise RecipeError(
                f"codec trellis: {self.rate:g} bits; allowed are multiples of {_RATE_UNIT} from 1 "
                f"to {most:g} with code {self.code} and state_bits {self.state_bits}"
            )
        if self.table_bits is not None and self.code not in ("hybrid", "gf2"):
            raise RecipeError(
                f"codec trellis: table_bits {self.table_bits} with code {self.code}; only hybrid "
                "and gf2 have a table of a size of its own"
            )
        if self.code == "gf2":
            self._check_parities()
        try:
            self.spec()
        except ValueError as error:
            raise RecipeError(f"codec trellis: {error}") from error
        return self

    def _check_parities(self) -> None:
        """Raise RecipeError for options that code gf2 does not have."""
        if self.step_weights not in (None, 1):
            raise RecipeError(
                f"codec trellis: code gf2 with {self.step_weights} weights a step; allowed: 1"
            )
        states, tables = trellis_maps.STATE_BITS, trellis_maps.TABLE_BITS
        if self.state_bits not in states:
            raise RecipeError(
                f"codec trellis: code gf2 with state_bits {self.state_bits}; allowed are "
                f"{states[0]} to {states[-1]}"
            )
        if self.table_bits not in (None, *tables):
            raise RecipeError(
                f"codec trellis: code gf2 with table_bits {self.table_bits}; allowed are "
                f"{' and '.join(map(str, tables))}"
            )

    @property
    def tile(self) -> tuple[int, int]:
        return (self.tile_rows, reference.WEIGHTS // self.tile_rows)

    @property
    def _step_weights(self) -> int:
        return self.step_weights or reference.WEIGHTS_OF_STEP.get(self.code, 1)

    @property
    def num_symbols(self) -> int:
        return self.spec().tile_bits // reference.WORD

    @property
    def gaussian_scale(self) -> float:  # type: ignore[override]
        if self.code == "gf2":
            return float(self._trained_table().abs().max()) / trellis_tables.LARGEST
        # A trained table of floats has the scale in it.
        stored = self.code in reference.STORED
        return 1.0 if stored else _best_scale(self.code, self.state_bits, self.rate)

    def spec(self) -> TrellisSpec | ParityTrellisSpec:
        tile_bits = round(self.rate * reference.WEIGHTS)
        if self.code == "gf2":
            masks = trellis_maps.best(self.state_bits, self.rate, self.table_bits)
            return _parity_spec(self.tile_rows, tile_bits, self.state_bits, masks)
        table_bits = 0
        if self.code == "hybrid":
            table_bits = self.table_bits or _TABLE_BITS
        return _spec(
            *(self.tile_rows, self.code, tile_bits),
            *(self.state_bits, self._step_weights, table_bits),
        )

    def fit(self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator) -> State:
        """`scale` float32 [1]; for a code with a stored table `table` as well: float16 as it is
        stored, or the integers of code gf2 in float32."""
        state = super().fit(X_IJE, weight_IJE, generator)
        if self.code == "gf2":
            unit = self.gaussian_scale
            state["table"] = (self._trained_table() / unit).round().to(X_IJE.device)
        elif self.code in reference.STORED:
            state["table"] = self._trained_table().to(X_IJE.device)
        return state

    def _trained_table(self) -> Tensor:
        """A table for unit Gaussian weights, whose training begins at the scale of mul1."""
        spec, scale = self.spec(), _best_scale("mul1", self.state_bits, self.rate)
        if isinstance(spec, ParityTrellisSpec):
            return trellis_tables.parity_table(spec, scale)
        return trellis_tables.trained_table(spec, scale)

    def encode(
        self, X_IJE: Tensor, state: State, col: int = 0, weight_E: Tensor | None = None
    ) -> Tensor:
        check_finite(X_IJE, self)
        x_NE = X_IJE.flatten(0, 1) / state["scale"]
        x_NTV = x_NE.unflatten(1, (-1, self._step_weights))
        tile_bits = self.spec().tile_bits
        shift_T = trellis_tables.shifts(tile_bits, self._step_weights)
        path_NT = viterbi.tail_biting(x_NTV, self._values(state), shift_T)
        return reference.words(path_NT, tile_bits).unflatten(0, X_IJE.shape[:2])

    def decode(self, codes_IJM: Tensor, state: State, col: int = 0) -> Tensor:
        spec = self.spec()
        return reference.decode_tiles(
            codes_IJM, self._values(state), state["scale"], spec.tile_bits, spec.state_bits
        )

    def project(self, state: State) -> State:
        if self.code != "gf2":
            return super().project(state)
        # Integers that training moved beyond the largest one are divided, and the scale grows.
        table_K1 = state["table"].detach().float()
        excess = (table_K1.abs().max() / trellis_tables.LARGEST).clamp(min=1)
        scale = state["scale"].detach().float() * excess
        return {**state, "scale": scale, "table": (table_K1 / excess).round()}

    def pack(self, codes_IJM: Tensor, state: State) -> dict[str, Tensor]:
        packed = {"codes": codes_IJM.to(torch.int16), **state}
        if self.code == "gf2":
            packed["table"] = state["table"].to(torch.int8)
        return packed

    def unpack(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Tensor, State]:
        codes_IJM = tensors["codes"].to(torch.int32) & 0xFFFF
        state = {name: t for name, t in tensors.items() if name != "codes"}
        if self.code == "gf2":
            state["table"] = state["table"].float()
        return codes_IJM, state

    def _values(self, state: State) -> Tensor:
        spec, table = self.spec(), state.get("table")
        if isinstance(spec, ParityTrellisSpec) and table is not None and not table.requires_grad:
            return _parity_values(spec, viterbi.Same(table))
        return spec.values(table, state["scale"].device)


@cache
def _spec(
    tile_rows: int,
    code: reference.Code,
    tile_bits: int,
    state_bits: int,
    step_weights: int,
    table_bits: int,
) -> TrellisSpec:
    """Asked for with every column of tiles; checking it takes as long as coding some of them."""
    return TrellisSpec(
        tile_rows=tile_rows,
        code=code,
        tile_bits=tile_bits,
        state_bits=state_bits,
        step_weights=step_weights,
        table_bits=table_bits,
    )


@lru_cache(maxsize=4)
def _parity_values(spec: ParityTrellisSpec, table: viterbi.Same) -> Tensor:
    """The same tensor for all columns of tiles, so that the search prepares it once."""
    return spec.values(table.tensor, table.tensor.device)


@cache
def _parity_spec(
    tile_rows: int, tile_bits: int, state_bits: int, masks: tuple[int, ...]
) -> ParityTrellisSpec:
    """The same for code gf2."""
    return ParityTrellisSpec(
        tile_rows=tile_rows, tile_bits=tile_bits, state_bits=state_bits, masks=masks
    )


def _best_scale(code: str, state_bits: int, rate: float) -> float:
    """Interpolated in `_SCALES` or `_PAIR_SCALES`; constant beyond their ends."""
    if code in PAIRS:
        return _interpolate(rate, _RATES, _PAIR_SCALES)

    def at(row: tuple[float, ...]) -> float:
        return _interpolate(rate, _RATES, row)

    return _interpolate(state_bits, tuple(_SCALES), tuple(at(row) for row in _SCALES.values()))


def _interpolate(x: float, xs: tuple[float, ...], ys: tuple[float, ...]) -> float:
    if x <= xs[0] or x >= xs[-1]:
        return ys[0] if x <= xs[0] else ys[-1]
    i = next(i for i, known in enumerate(xs) if known >= x)
    part = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + part * (ys[i] - ys[i - 1])
