"""Sizes of files as people write them: 80MB, 1.5 GB, 700MiB."""

import re

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
"""Bytes of each, by its name in upper case."""


def parse_bytes(text: str) -> int | None:
    """The bytes of a size with or without a unit, in either case; None if it is no size above 0."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or (unit := match[2].upper() or "B") not in UNITS:
        return None
    return int(float(match[1]) * UNITS[unit]) or None
