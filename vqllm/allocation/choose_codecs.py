"""A codec for every linear, within the recipe's budget of bits.

losses of each linear with each codec (`expected_loss.py`)  ─┐
bits that each codec takes (`vqllm/plan/costs.py`)          ─┴► the choice (`budget.py`)
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vqllm.allocation.budget import Item, allocate_or_least
from vqllm.core.listing import listed
from vqllm.core.protocols import Codec
from vqllm.plan.costs import options
from vqllm.plan.selection import Selection
from vqllm.recipes import Recipe

logger = logging.getLogger(__name__)

SHOWN = 14
"""Names that a warning lists: two layers of a Llama."""


@dataclass(frozen=True)
class Allocated:
    """The codec that a linear got from a budget."""

    codec: Codec
    expected_kl: float
    """nats a token that errors in this linear alone add to the KL divergence of the predictions"""


def linear_items(
    selection: Selection, recipe: Recipe, loss_of: Callable[[str, int, int], float]
) -> tuple[list[Item], list[tuple[int, ...]]]:
    """The linears that are to be quantized, in their order, with the codecs that each may get: the
    bits that it takes there, and its loss. A codec that would make it larger is none.

    Args:
        loss_of: nats a token, of a linear's full name, the number of a codec in the recipe's list,
            and the bits that it takes.

    Returns:
        the items, and by option the numbers of the codecs.
    """
    costs_of = cache(lambda shape, limit: options(shape, recipe, limit))
    items, numbers = [], []
    for name, shape in selection.shapes.items():
        costs = costs_of(shape, selection.limits[name])
        losses = tuple(loss_of(name, number, cost) for number, cost in costs.items())
        items.append(Item(tuple(costs.values()), losses))
        numbers.append(tuple(costs))
    return items, numbers


def choose_codecs(
    selection: Selection, losses: Mapping[str, Tensor], recipe: Recipe
) -> dict[str, Tensor]:
    """The codecs of least expected loss within the budget.

    Args:
        selection: the linears that are to be quantized.
        losses: nats a token that each linear costs with each of the recipe's codecs, float64 [K].

    Returns:
        by full name the number of the codec in the recipe's list, and its expected loss.
    """
    allocation = recipe.allocation
    assert allocation is not None, "asked for"
    # For a linear that no token reached, or whose outputs have no gradient, the loss is 0 with each
    # codec, so it gets the cheapest.
    nothing = [0.0] * len(allocation.codecs)
    known = {name: losses[name].tolist() or nothing for name in selection.shapes}
    items, numbers = linear_items(selection, recipe, lambda name, number, _: known[name][number])
    shapes = selection.shapes
    numel = sum(rows * cols for rows, cols in shapes.values())
    picks = allocate_or_least(items, allocation.bits * numel)
    spent = sum(item.costs[pick] for item, pick in zip(items, picks))
    expected = sum(item.losses[pick] for item, pick in zip(items, picks))
    logger.info(
        "%d linears share %.4f bits a weight; expected KL divergence %.3g",
        len(items),
        spent / numel,
        expected,
    )
    if idle := [name for name, item in zip(shapes, items) if not any(item.losses)]:
        logger.warning(
            "the predictions do not depend on %d linears, which get the cheapest codec: %s",
            len(idle),
            listed(idle, SHOWN),
        )
    return {
        name: torch.tensor([own[pick], item.losses[pick]], dtype=torch.float64)
        for name, item, own, pick in zip(shapes, items, numbers, picks)
    }
