"""Names in messages."""

from collections.abc import Collection

SHOWN = 3
"""A model may have thousands of tensors."""


def listed(names: Collection[str], shown: int = SHOWN) -> str:
    """The first few names, and how many more there are."""
    first = sorted(names)[:shown]
    more = f" and {len(names) - len(first)} more" if len(names) > len(first) else ""
    return ", ".join(first) + more
