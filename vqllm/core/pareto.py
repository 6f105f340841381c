"""Which of several choices no other one beats in both of two costs."""

from collections.abc import Sequence


def pareto_front(costs: Sequence[float], losses: Sequence[float]) -> list[bool]:
    """Which points no other one beats: no larger in both, and smaller in one. Equal points stay."""
    # By rising cost, a point is on the front if its loss is below all before it.
    front = [False] * len(costs)
    best = float("inf")
    order = sorted(range(len(costs)), key=lambda i: (costs[i], losses[i]))
    last: tuple[float, float] | None = None
    for i in order:
        point = (costs[i], losses[i])
        front[i] = losses[i] < best or point == last
        if losses[i] < best:
            best, last = losses[i], point
    return front
