"""Where processes that share out a model cut its linears, and recipes whose transforms end there.

    q, k, v, gate, up    each process has some rows of W, whole heads of them
    o, down              each process has the columns that belong to these features

Such linears are then multiplied without gathering activations: a layer adds up its outputs twice,
as a dense one does. Source: Shoeybi et al., "Megatron-LM", arXiv 1909.08053, section 3.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from torch import nn

from vqllm.core.listing import listed
from vqllm.errors import RecipeError
from vqllm.plan.costs import Shape
from vqllm.plan.packed_spec import linear_spec
from vqllm.recipes import Recipe
from vqllm_kernels.slices import obstacle_to_columns, obstacle_to_rows

logger = logging.getLogger(__name__)

LARGEST = 64
"""The largest number of processes that messages look at."""

KEYS_AND_VALUES = frozenset({"k_proj", "v_proj"})
ROWS = KEYS_AND_VALUES | {
    *("q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj"),
    *("fc1", "c_fc", "dense_h_to_4h", "w1", "w3"),
}
"""Last parts of names of linears that are cut between rows."""
COLUMNS = frozenset(
    {"o_proj", "out_proj", "down_proj", "fc2", "c_proj", "dense", "dense_4h_to_h", "w2", "wo"}
)
"""Of those that are cut between columns. Linears of other names may be several matrices in one
(q, k and v, or gate and up), which parts of equal size do not cut: they are not cut."""


@dataclass(frozen=True)
class Cut:
    """A side of a linear whose features are in equal parts in different processes."""

    side: Literal["in", "out"]
    part: int
    """features of a part"""


@dataclass(frozen=True)
class Heads:
    """Of attention; 0 where a model does not say."""

    queries: int
    keys: int

    @classmethod
    def of(cls, model: nn.Module) -> "Heads":
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if config is not None else None
        queries = getattr(text, "num_attention_heads", None)
        keys = getattr(text, "num_key_value_heads", None) or queries
        return cls(*(n if isinstance(n, int) else 0 for n in (queries, keys)))

    def obstacle(self, num: int) -> str | None:
        """Why so many processes cannot share out whole heads; None if they can."""
        if self.queries % num:
            return f"{self.queries} attention heads do not divide by {num}"
        if self.keys % num and num % max(self.keys, 1):
            return f"{self.keys} heads of keys and values neither divide by {num} nor divide it"
        return None


def divided(recipe: Recipe, cut: Cut | None) -> Recipe:
    """The recipe of a linear: where it is cut, no transform mixes features of two parts."""
    if cut is None:
        return recipe
    transforms = tuple(
        transform.divided(cut.part) if transform.side == cut.side else transform
        for transform in recipe.transforms
    )
    return recipe.model_copy(update={"transforms": transforms})


def cuts_of(model: nn.Module, shapes: Mapping[str, Shape], recipe: Recipe) -> dict[str, Cut]:
    """Where the recipe's number of processes cuts linears.

    Args:
        model: with its config.
        shapes: rows and columns of linears that are to be quantized, by full name.

    Raises:
        RecipeError: heads, tiles or a transform do not let it; says which numbers would do.
    """
    num, heads = recipe.tensor_parallel, Heads.of(model)
    if num == 1:
        return {}
    why_not = cache(lambda shape, cut: _obstacle(shape, cut, recipe))
    obstacle = _first_obstacle(num, heads, shapes, why_not)
    if obstacle is not None:
        others = range(2, LARGEST + 1)
        fits = [n for n in others if _first_obstacle(n, heads, shapes, why_not) is None]
        raise RecipeError(
            f"tensor_parallel is {num}, but {obstacle}. With this recipe the model can be divided "
            f"by {', '.join(map(str, [1, *fits]))}: --set tensor_parallel={(fits or [1])[0]}"
        )
    if 0 < heads.keys < num:
        logger.warning(
            "tensor_parallel is %d: there are %d heads of keys and values, so %d processes hold "
            "the same ones",
            *(num, heads.keys, num // heads.keys),
        )
    cuts = {name: _cut(name, shape, num, heads) for name, shape in shapes.items()}
    _say_whole({name.rpartition(".")[2] for name, cut in cuts.items() if cut is None}, num)
    return {name: cut for name, cut in cuts.items() if cut is not None}


def _say_whole(names: Collection[str], num: int) -> None:
    if names:
        logger.warning(
            "tensor_parallel is %d: it is not known how %s are shared out, so their transforms mix "
            "all features, and processes gather activations there",
            *(num, listed(sorted(names))),
        )


def _cut(name: str, shape: Shape, num: int, heads: Heads) -> Cut | None:
    """Where a linear is cut, in parts of 0 features where they do not divide."""
    last = name.rpartition(".")[2]
    rows, cols = shape
    if last in KEYS_AND_VALUES and heads.keys:
        return Cut("out", _part(rows, min(num, heads.keys)))
    if last in ROWS:
        return Cut("out", _part(rows, num))
    return Cut("in", _part(cols, num)) if last in COLUMNS else None


def _part(size: int, num: int) -> int:
    return size // num if size % num == 0 else 0


def _first_obstacle(
    num: int,
    heads: Heads,
    shapes: Mapping[str, Shape],
    why_not: Callable[[Shape, Cut], str | None],
) -> str | None:
    """Why so many processes cannot share out the linears; None if they can."""
    if obstacle := heads.obstacle(num):
        return obstacle
    for name, shape in shapes.items():
        cut = _cut(name, shape, num, heads)
        if cut is not None and (obstacle := why_not(shape, cut)):
            size, kind = (shape[0], "rows") if cut.side == "out" else (shape[1], "columns")
            return f"{name} has {size} {kind}, and {obstacle}"
    return None


def _obstacle(shape: Shape, cut: Cut, recipe: Recipe) -> str | None:
    """Why a linear cannot be cut with some of the codecs that it may get; None if it can."""
    size = shape[0] if cut.side == "out" else shape[1]
    if not cut.part:
        return "they do not divide"
    own = (0, cut.part) if 2 * cut.part > size else (cut.part, 2 * cut.part)
    fragile = [] if recipe.fragile is None else [recipe.fragile.codec]
    for codec in (*recipe.codecs, *fragile):
        spec = linear_spec(*shape, divided(recipe, cut).with_codec(codec))
        of_side = obstacle_to_rows if cut.side == "out" else obstacle_to_columns
        if obstacle := of_side(spec, own):
            return f"each process would have {cut.part} of them, but {obstacle}"
    return None
