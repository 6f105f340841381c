"""Named implementations: one registry for each kind of part of a recipe."""

import difflib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from vqllm.errors import RecipeError
from vqllm_kernels import plugins

P = TypeVar("P")
C = TypeVar("C")


class Registry(Generic[P]):
    """A mapping from the `type` written in a recipe to the class that implements it.

    Classes of other installed packages are found by their entry points, which are loaded when the
    registry is first listed or asked for a name that it lacks. What is registered by then keeps its
    name.
    """

    def __init__(self, kind: str, base: type = object, group: str | None = None) -> None:
        """
        Args:
            kind: what the parts are, for messages.
            base: what classes of other packages must be derived from.
            group: of entry points.
        """
        self.kind = kind
        self._base = base
        self._group = group
        self._parts: dict[str, Any] = {}
        self._problems: dict[str, str] | None = None

    def register(self, name: str) -> Callable[[type[C]], type[C]]:
        """Class decorator that makes a part available to recipes as `type: name`."""

        def add(part: type[C]) -> type[C]:
            if name in self._parts:
                raise ValueError(
                    f"{self.kind} {name!r} is registered twice: by {self._parts[name].__module__} "
                    f"and by {part.__module__}"
                )
            self._parts[name] = part
            return part

        return add

    def get(self, name: str) -> type[P]:
        """The class registered as `name`.

        Raises:
            RecipeError: there is none, with the choices; or the package that brings it is broken,
                with the reason.
        """
        if name in self:
            return self._parts[name]
        raise RecipeError(self._load().get(name) or unknown(self.kind, name, self))

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._parts))

    def __contains__(self, name: object) -> bool:
        if name not in self._parts:
            self._load()
        return name in self._parts

    def _load(self) -> dict[str, str]:
        """Load the entry points, once. What is wrong with those that failed, by name."""
        if self._problems is None:
            self._problems = {}  # before loading: a package may ask for a name when it is imported
            if self._group:
                self._problems = plugins.load(self._group, self._parts, self._base)
        return self._problems


def unknown(kind: str, name: object, choices: "Iterator[str] | Registry | list[str]") -> str:
    """The message for a name that is not among `choices`, with the nearest one suggested."""
    names = list(choices)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}."
