"""Parameters of tests of which some are marked slow."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """One set of parameters, slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


def each_with_one_of(
    names: Iterable[str], others: Sequence[Any], quick: Collection[str] | None = None
) -> list[Any]:
    """Every name with every one of `others`, slow but for one of them for each of the `quick`
    names, in turn; all names are quick by default."""
    names = list(names)
    quick = names if quick is None else [name for name in names if name in quick]
    turn = {name: i % len(others) for i, name in enumerate(quick)}
    return [
        pytest.param(name, other, id=f"{name}-{other}", marks=marks)
        for name in names
        for j, other in enumerate(others)
        for marks in [() if turn.get(name) == j else pytest.mark.slow]
    ]


def slow_but(quick: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Values of one parameter, all slow but the `quick` ones."""
    values = list(values)
    assert all(value in values for value in quick), "a quick one that is not there"
    return [value if value in quick else slow(value) for value in values]
