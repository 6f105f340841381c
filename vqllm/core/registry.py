"""Named implementations: one registry for each kind of part of a recipe."""

import difflib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from vqllm.errors import RecipeError

P = TypeVar("P")
C = TypeVar("C")


class Registry(Generic[P]):
    """A mapping from the `type` written in a recipe to the class that implements it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._parts: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[type[C]], type[C]]:
        """Class decorator that makes a part available to recipes as `type: name`."""

        def add(part: type[C]) -> type[C]:
            if name in self._parts:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._parts[name] = part
            return part

        return add

    def get(self, name: str) -> type[P]:
        """The class registered as `name`; RecipeError lists the choices when there is none."""
        if name not in self._parts:
            raise RecipeError(unknown(self.kind, name, self))
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._parts))

    def __contains__(self, name: object) -> bool:
        return name in self._parts


def unknown(kind: str, name: object, choices: "Iterator[str] | Registry | list[str]") -> str:
    """The message for a name that is not among `choices`, with the nearest one suggested."""
    names = list(choices)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}."
