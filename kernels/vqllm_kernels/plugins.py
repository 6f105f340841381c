"""Parts that other installed packages bring: they name them in entry points."""

import logging
from importlib.metadata import EntryPoint, entry_points
from typing import Any

logger = logging.getLogger(__name__)


def load(group: str, parts: dict[str, Any], base: type) -> dict[str, str]:
    """Add to `parts` what the entry points of a group lead to.

    An entry point has the name of its part. It leads to the class, or to a module that registers
    the class in `parts` when it is imported. One that fails leaves `parts` as they were and is
    logged as a warning, so that a broken package does no harm to the others.

    Args:
        group: for example "vqllm.codecs".
        parts: classes by name.
        base: what the classes must be derived from.

    Returns:
        What is wrong with the entry points that failed, by name.
    """
    by_name: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        by_name.setdefault(point.name, []).append(point)
    problems = {}
    for name, points in sorted(by_name.items()):
        before = set(parts)
        try:
            if len(points) > 1:
                raise ValueError("one name cannot belong to two packages")
            _add(points[0], parts, base)
        except Exception as error:  # whatever a foreign module raises
            for added in set(parts) - before:
                del parts[added]
            problems[name] = _problem(group, points, error)
            logger.warning("%s", problems[name])
    return problems


def _add(point: EntryPoint, parts: dict[str, Any], base: type) -> None:
    """Load one entry point; raises whatever the module raises, ValueError or TypeError."""
    found = point.load()
    if isinstance(found, type):
        parts.setdefault(point.name, found)
        if parts[point.name] is not found:
            raise ValueError(f"the name {point.name!r} is that of {parts[point.name]} already")
    if point.name not in parts:
        raise ValueError(f"{point.value} registers no {point.name!r}")
    part = parts[point.name]
    if not (isinstance(part, type) and issubclass(part, base)):
        raise TypeError(f"{part!r} is not derived from {base.__name__}")


def _problem(group: str, points: list[EntryPoint], error: Exception) -> str:
    names = [point.dist.name if point.dist else "?" for point in points]
    return (
        f"{points[0].name!r} of {' and of '.join(names)} cannot be used: "
        f"{type(error).__name__}: {error}. It is an entry point of the group {group} and leads to "
        f"{points[0].value}. Repair the package, or remove it: pip uninstall {names[-1]}"
    )
