"""Trellis-coded quantization: 256 weights of a tile as a closed path through a bitshift trellis.

Every weight is a function of the last L bits of a stream, so the code has the gain of a codebook
with 2^256 entries at a search of 2^L states a weight. Nothing is stored but the path and a scale.
Made for weights that a random rotation has made Gaussian.

Source: QTIP, arXiv 2406.11235; the mul1 code: exllamav3. Rates between whole bits are reached by
steps that take different numbers of new bits, spread evenly; at 2.5 bits that costs nothing (0.77
dB above Shannon's limit with 2^12 states, between 0.67 dB at 2 bits and 0.86 dB at 3).
"""

from functools import cache
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from vqllm.codecs.base import CODECS, ScaledCodec, check_finite
from vqllm.codecs.search import viterbi
from vqllm.core.protocols import Point, State
from vqllm.errors import RecipeError
from vqllm_kernels.trellis import reference
from vqllm_kernels.trellis.spec import TrellisSpec

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
_ROUNDS = 60
"""Passes that train a table. At 2^8 states and 2 bits the distortion is 0.0842 with the computed
values, 0.0818 after 5 rounds, 0.0798 after 20."""


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
    code: reference.Code = Field(
        "mul1",
        description="the values of the states: 1mad, mul1, 3inst, bytes4 (computed), mul2, bytes2 "
        "(computed, 2 weights a step), hybrid (a small trained table, 2 weights a step), table (a "
        "trained table of all states)",
    )
    step_weights: int | None = Field(
        None, ge=1, le=2, description="weights a step; null is what the code has, 1 for table"
    )
    table_bits: int | None = Field(
        None,
        ge=1,
        le=15,
        description=f"hybrid: 2^table_bits entries; null is {_TABLE_BITS}",
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
        if self.table_bits is not None and self.code != "hybrid":
            raise RecipeError(
                f"codec trellis: table_bits {self.table_bits} with code {self.code}; only hybrid "
                "has a table of a size of its own"
            )
        try:
            self.spec()
        except ValueError as error:
            raise RecipeError(f"codec trellis: {error}") from error
        return self

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
        # A trained table has the scale in it.
        stored = self.code in reference.STORED
        return 1.0 if stored else _best_scale(self.code, self.state_bits, self.rate)

    def spec(self) -> TrellisSpec:
        table_bits = 0
        if self.code == "hybrid":
            table_bits = self.table_bits or _TABLE_BITS
        tile_bits = round(self.rate * reference.WEIGHTS)
        return _spec(
            *(self.tile_rows, self.code, tile_bits),
            *(self.state_bits, self._step_weights, table_bits),
        )

    def fit(self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator) -> State:
        """`scale` float32 [1]; for a code with a stored table `table` float16 as well."""
        state = super().fit(X_IJE, weight_IJE, generator)
        if self.code in reference.STORED:
            state["table"] = _trained_table(self.spec()).to(X_IJE.device)
        return state

    def encode(
        self, X_IJE: Tensor, state: State, col: int = 0, weight_E: Tensor | None = None
    ) -> Tensor:
        check_finite(X_IJE, self)
        x_NE = X_IJE.flatten(0, 1) / state["scale"]
        words_NM = _encode(x_NE, self.spec(), self._values(state))
        return words_NM.unflatten(0, X_IJE.shape[:2])

    def decode(self, codes_IJM: Tensor, state: State, col: int = 0) -> Tensor:
        spec = self.spec()
        return reference.decode_tiles(
            codes_IJM, self._values(state), state["scale"], spec.tile_bits, spec.state_bits
        )

    def pack(self, codes_IJM: Tensor, state: State) -> dict[str, Tensor]:
        return {"codes": codes_IJM.to(torch.int16), **state}

    def unpack(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Tensor, State]:
        codes_IJM = tensors["codes"].to(torch.int32) & 0xFFFF
        return codes_IJM, {name: t for name, t in tensors.items() if name != "codes"}

    def _values(self, state: State) -> Tensor:
        spec = self.spec()
        device = state["scale"].device
        return reference.values(
            spec.code, spec.state_bits, spec.table_bits, state.get("table"), device
        )


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


def _encode(x_NE: Tensor, spec: TrellisSpec, values_SV: Tensor) -> Tensor:
    """Words of the best paths of tiles of weights in units of the scale: int32 [N, M]."""
    x_NTV = x_NE.unflatten(1, (-1, spec.step_weights))
    return reference.words(viterbi.tail_biting(x_NTV, values_SV, _shifts(spec)), spec.tile_bits)


@cache
def _shifts(spec: TrellisSpec) -> list[int]:
    """New bits of every step."""
    ends = reference.step_ends(spec.tile_bits, reference.WEIGHTS // spec.step_weights)
    return [b - a for a, b in zip([0, *ends], ends)]


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


@cache
def _trained_table(spec: TrellisSpec) -> Tensor:
    """A table for unit Gaussian weights, float16: entries become the means of the weights that have
    their code.

    The Lloyd algorithm with fresh Gaussian tiles in every round, the sums of earlier rounds
    counting half as much with each. Trained once in a process; the same for every matrix.
    """
    generator = torch.Generator().manual_seed(0)
    entries = 1 << (spec.table_bits or spec.state_bits)
    table_KV = _first_table(spec, generator)
    num_tiles = max(64, min(1024, 4 * entries * spec.step_weights // 16))
    sums_KV, counts_K = torch.zeros_like(table_KV).double(), torch.zeros(entries).double()
    for _ in range(_ROUNDS):
        # Paths of new weights with the table so far, rounded as it will be stored.
        x_NTV = torch.randn(num_tiles, reference.WEIGHTS, generator=generator)
        x_NTV = x_NTV.unflatten(1, (-1, spec.step_weights))
        values_SV = reference.values(
            spec.code, spec.state_bits, spec.table_bits, table_KV.half(), table_KV.device
        )
        state_N = viterbi.tail_biting(x_NTV, values_SV, _shifts(spec)).flatten().long()
        # Each step used one entry, with signs: the weights times these signs are its samples.
        entry_N, sign_NV = reference.entries(spec.code, spec.table_bits, state_N)
        x_NV = x_NTV.flatten(0, 1).double() * sign_NV
        counts_K = counts_K / 2 + torch.bincount(entry_N, minlength=entries).double()
        totals = [torch.bincount(entry_N, column, entries) for column in x_NV.unbind(1)]
        sums_KV = sums_KV / 2 + torch.stack(totals, 1)
        # An entry with two samples or fewer keeps its value; samples of earlier rounds count less.
        trained = counts_K[:, None] > 2
        table_KV = torch.where(trained, sums_KV / counts_K[:, None], table_KV).float()
    return table_KV.half()


def _first_table(spec: TrellisSpec, generator: torch.Generator) -> Tensor:
    """Where training begins, in units of the weights: the values of mul1 or Gaussian entries."""
    scale = _best_scale("mul1", spec.state_bits, spec.tile_bits / reference.WEIGHTS)
    if spec.code == "table" and spec.step_weights == 1:
        cpu = torch.device("cpu")
        return scale * reference.computed_values("mul1", spec.state_bits, cpu)
    entries = 1 << (spec.table_bits or spec.state_bits)
    return scale * torch.randn(entries, spec.step_weights, generator=generator)
