"""What a linear takes with each of the codecs that it may get."""

from vqllm.core.bits import count
from vqllm.core.protocols import Codec
from vqllm.plan.packed_spec import stored_spec
from vqllm.recipes import Recipe

Shape = tuple[int, int]
"""Rows and columns."""

WHOLE_TILES = 256
"""Along each side of a matrix, for the bits of codes alone: bytes that are filled up in part do not
show."""


def code_bits(codec: Codec) -> float:
    """Bits of codes for a weight, in a matrix of whole tiles."""
    rows, cols = (WHOLE_TILES * size for size in codec.tile)
    return codec.bits(rows, cols).codes / (rows * cols)


def option_costs(shape: Shape, recipe: Recipe) -> tuple[int, ...]:
    """Bits of a linear with each of the codecs that it may get, all included."""
    return tuple(
        count(stored_spec(*shape, recipe.with_codec(codec)).layout()).total
        for codec in recipe.codecs
    )


def layouts(shape: Shape, recipe: Recipe) -> set[tuple[str, ...]]:
    """Names of the packed tensors that a linear has with each of the codecs that it may get."""
    specs = (stored_spec(*shape, recipe.with_codec(codec)) for codec in recipe.codecs)
    return {tuple(spec.layout()) for spec in specs}


def options(shape: Shape, recipe: Recipe, limit: float) -> dict[int, int]:
    """Those of the `option_costs` that are below a limit, by the number of the codec in the
    recipe's list."""
    costs = option_costs(shape, recipe)
    return {number: cost for number, cost in enumerate(costs) if cost < limit}
