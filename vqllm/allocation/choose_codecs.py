"""A codec for every linear, within the recipe's budget of bits.

losses of each linear with each codec (`expected_loss.py`)  ─┐
bits that each codec takes (`vqllm/plan/costs.py`)          ─┴► the choice (`budget.py`)
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vqllm.allocation.budget import Item, allocate
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
    # Options of a linear: the bits that each codec takes, and the loss expected with it. A codec
    # that would make it larger is none. For a linear that no token reached, or whose outputs have
    # no gradient, the loss is 0 with each codec, so it gets the cheapest.
    shapes, items, numbers = selection.shapes, [], []
    for name, shape in shapes.items():
        costs = options(shape, recipe, selection.limits[name])
        known = losses[name].tolist() or [0.0] * len(allocation.codecs)
        items.append(Item(tuple(costs.values()), tuple(known[number] for number in costs)))
        numbers.append(tuple(costs))
    # A budget below the cheapest codecs is raised to them.
    numel = sum(rows * cols for rows, cols in shapes.values())
    least = sum(min(item.costs) for item in items)
    picks = allocate(items, max(allocation.bits * numel, least))
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
