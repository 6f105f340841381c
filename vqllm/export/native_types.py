"""llama.cpp's native types of quantized tensors, as far as they are written here.

A type codes blocks of 32 or 256 weights of a row. All of them have the same form: in a group of
weights

    w = step · v + offset        v an integer of a range, or a value of a table of 16, or an element
                                 of a signed vector of a grid, which codes 8 weights, or 4

and differ in how a block stores the steps and offsets of its groups:

    plain    Q4_0 Q5_0 Q8_0 IQ4_NL       step = d                 no offset
             Q4_1 Q5_1                   step = d                 offset = m
    scaled   Q3_K Q6_K IQ4_XS            step = d · s             no offset
             Q2_K Q4_K Q5_K              step = d · s             offset = −dmin · m
    vectors  IQ2_XXS IQ2_XS IQ2_S        step = d · (1/8 + s/4)   no offset
             IQ3_XXS                     step = d · (1/4 + s/2)   no offset
             IQ3_S                       step = d · (1 + 2 s)     no offset

d, dmin and the m of Q4_1 and Q5_1 are float16, one a block; s and the m of Q2_K, Q4_K and Q5_K are
integers of a few bits, one a group.

Source: llama.cpp (MIT), ggml/src/ggml-common.h has the layouts; the package `gguf` decodes them.
"""

from dataclasses import dataclass

from vqllm.errors import RecipeError

NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The values of IQ4_NL and IQ4_XS."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Vectors of magnitudes, one of which codes some weights of a row, with signs."""

    size: int
    width: int
    """weights that a vector codes"""
    parity: bool
    """whether signs come 7 for 8 weights, so that an even number of them is minus"""


@dataclass(frozen=True, kw_only=True)
class NativeType:
    """One type."""

    name: str
    block: int
    """weights of a row that are stored together"""
    num_bytes: int
    """of a block"""
    group: int
    """weights that share a step"""
    values: tuple[int, ...] = ()
    """what a code of one weight can mean, ascending; code i is values[i]"""
    grid: Grid | None = None
    """of a type whose codes are vectors; it has no `values` then"""
    scales: tuple[int, int] | None = None
    """the least and the largest integer s of a group; None where the step is d itself"""
    scaled_by: tuple[float, float] = (0.0, 1.0)
    """a and b of step = d · (a + b s)"""
    has_offset: bool = False
    max_min: int | None = None
    """the largest integer m of a group; None where the offset, if there is one, is float16"""
    fallback: str | None = None
    """the type that llama-quantize takes in its place for rows that it does not divide"""

    @property
    def bits(self) -> float:
        """Of a weight, all included."""
        return 8 * self.num_bytes / self.block

    @property
    def tile_cols(self) -> int:
        """Weights of a row that are coded together."""
        if self.grid is None:
            return 1
        return 8 if self.grid.parity else self.grid.width


def _range(low: int, high: int) -> tuple[int, ...]:
    return tuple(range(low, high + 1))


def _of_vectors(
    name: str, num_bytes: int, group: int, grid: Grid, scaled_by: tuple[float, float]
) -> NativeType:
    return NativeType(
        name=name,
        block=256,
        num_bytes=num_bytes,
        group=group,
        grid=grid,
        scales=(0, 15),
        scaled_by=scaled_by,
        fallback="IQ4_NL",
    )


_ALL = (
    NativeType(name="Q4_0", block=32, num_bytes=18, group=32, values=_range(-8, 7)),
    NativeType(
        name="Q4_1", block=32, num_bytes=20, group=32, values=_range(0, 15), has_offset=True
    ),
    NativeType(name="Q5_0", block=32, num_bytes=22, group=32, values=_range(-16, 15)),
    NativeType(
        name="Q5_1", block=32, num_bytes=24, group=32, values=_range(0, 31), has_offset=True
    ),
    NativeType(name="Q8_0", block=32, num_bytes=34, group=32, values=_range(-128, 127)),
    NativeType(name="IQ4_NL", block=32, num_bytes=18, group=32, values=NON_LINEAR),
    NativeType(
        name="Q2_K",
        block=256,
        num_bytes=84,
        group=16,
        values=_range(0, 3),
        scales=(0, 15),
        has_offset=True,
        max_min=15,
        fallback="Q4_0",
    ),
    NativeType(
        name="Q3_K",
        block=256,
        num_bytes=110,
        group=16,
        values=_range(-4, 3),
        scales=(-32, 31),
        fallback="Q4_0",
    ),
    NativeType(
        name="Q4_K",
        block=256,
        num_bytes=144,
        group=32,
        values=_range(0, 15),
        scales=(0, 63),
        has_offset=True,
        max_min=63,
        fallback="Q5_0",
    ),
    NativeType(
        name="Q5_K",
        block=256,
        num_bytes=176,
        group=32,
        values=_range(0, 31),
        scales=(0, 63),
        has_offset=True,
        max_min=63,
        fallback="Q5_1",
    ),
    NativeType(
        name="Q6_K",
        block=256,
        num_bytes=210,
        group=16,
        values=_range(-32, 31),
        scales=(-128, 127),
        fallback="Q8_0",
    ),
    NativeType(
        name="IQ4_XS",
        block=256,
        num_bytes=136,
        group=32,
        values=NON_LINEAR,
        scales=(-32, 31),
        fallback="IQ4_NL",
    ),
    _of_vectors("IQ2_XXS", 66, 32, Grid(size=256, width=8, parity=True), (1 / 8, 1 / 4)),
    _of_vectors("IQ2_XS", 74, 16, Grid(size=512, width=8, parity=True), (1 / 8, 1 / 4)),
    _of_vectors("IQ2_S", 82, 16, Grid(size=1024, width=8, parity=False), (1 / 8, 1 / 4)),
    _of_vectors("IQ3_XXS", 98, 32, Grid(size=256, width=4, parity=True), (1 / 4, 1 / 2)),
    _of_vectors("IQ3_S", 110, 32, Grid(size=512, width=4, parity=False), (1.0, 2.0)),
)

TYPES = {own.name: own for own in _ALL}
"""All of them by llama.cpp's name."""


def type_of(name: str) -> NativeType:
    """The type of this name, in either case. RecipeError where there is none."""
    found = TYPES.get(name.upper())
    if found is None:
        raise RecipeError(
            f"{name!r} is no GGUF type that is written here; allowed are {', '.join(TYPES)}."
        )
    return found


def type_for(wanted: NativeType, cols: int) -> NativeType | None:
    """The type for rows of `cols` weights: the one that is wanted, or what llama-quantize takes in
    its place where blocks of 256 do not divide them; None where no type does."""
    if cols % wanted.block == 0:
        return wanted
    other = TYPES.get(wanted.fallback or "")
    return other if other is not None and cols % other.block == 0 else None
