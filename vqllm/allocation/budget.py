"""Choose one option for every item: least total loss within a budget.

Each item's options are points (cost, loss). Every item starts with its cheapest option. A step
moves one item to its next option along the lower convex hull of its points. The step that lowers
the loss most for its cost comes first, and steps go on as long as one fits the budget. Up to the
last bits of the budget this is the optimum: steps are taken in the order of one Lagrange
multiplier, and the optimum is better by less than one step.

    loss │ ●
         │   ╲             ● on the hull: can be chosen
         │     ●  ○        ○ above it: never chosen
         │        ╲ ___
         │            ●──── ●
         └───────────────────── cost

Source: Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", IEEE
Trans. ASSP 36(9), 1988; for the weights of language models Lee et al., "Q-Palette",
arXiv 2509.20214.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """The options of one item: of each its cost, a whole number, and its loss."""

    costs: tuple[int, ...]
    losses: tuple[float, ...]


def allocate(items: Sequence[Item], budget: float) -> list[int]:
    """The number of the option that each item gets.

    Args:
        items: with at least one option each.
        budget: of the sum of costs; in the unit of the costs.

    Raises:
        ValueError: the cheapest options together cost more than the budget.
    """
    # Every item starts at the cheapest option of its hull; place[i] is how far item i has come.
    hulls = [_hull(item) for item in items]
    place = [0] * len(items)
    spent = sum(item.costs[hull[0]] for item, hull in zip(items, hulls))
    if spent > budget:
        raise ValueError(f"the cheapest options cost {spent}, more than the budget of {budget:g}")
    steps: list[tuple[float, int]] = []

    def offer(i: int) -> None:
        """The next step of item i; among equal ones the item that comes first has precedence."""
        hull = hulls[i][place[i] : place[i] + 2]
        if len(hull) == 2:
            heapq.heappush(steps, (-_gain(items[i], *hull), i))

    # The heap holds the next step of each item, the largest gain first. A step that does not fit
    # the budget ends its item; smaller steps of other items may still fit.
    for i in range(len(items)):
        offer(i)
    while steps:
        _, i = heapq.heappop(steps)
        here, there = hulls[i][place[i] : place[i] + 2]
        cost = items[i].costs[there] - items[i].costs[here]
        if spent + cost <= budget:
            spent += cost
            place[i] += 1
            offer(i)
    return [hull[at] for hull, at in zip(hulls, place)]


def allocate_or_least(items: Sequence[Item], budget: float) -> list[int]:
    """The same; a budget below the cheapest options is raised to them."""
    return allocate(items, max(budget, sum(min(item.costs) for item in items)))


def _hull(item: Item) -> list[int]:
    """The options on the lower convex hull, from the cheapest to that of least loss."""
    options = sorted(range(len(item.costs)), key=lambda o: (item.costs[o], item.losses[o], o))
    hull: list[int] = []
    for option in options:
        if hull and item.losses[option] >= item.losses[hull[-1]]:
            continue
        # An option above the line between its neighbours is not on the hull.
        while len(hull) > 1 and _gain(item, *hull[-2:]) <= _gain(item, hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _gain(item: Item, cheap: int, dear: int) -> float:
    """Loss that is saved for each unit of cost."""
    return (item.losses[cheap] - item.losses[dear]) / (item.costs[dear] - item.costs[cheap])
