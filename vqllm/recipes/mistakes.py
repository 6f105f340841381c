"""What is wrong with a recipe, in lines for people."""

import reprlib

from pydantic import ValidationError


def mistakes(error: ValidationError) -> list[str]:
    """For each mistake its place, what is allowed there, and what came."""
    lines = []
    places = [item["loc"] for item in error.errors()]
    for item in error.errors():
        own = item["loc"]
        if item["type"] == "too_short" and any(
            place[: len(own)] == own and place != own for place in places
        ):
            continue  # items that are wrong are not counted, and have lines of their own
        place = ".".join(map(str, own))
        place += ": " if place else ""
        if item["type"] == "extra_forbidden":
            lines.append(f"{place}unknown key")
        elif item["type"] == "missing":
            lines.append(f"{place}missing")
        elif item["type"] == "value_error":
            lines.append(place + item["msg"].removeprefix("Value error, "))
        else:
            lines.append(f"{place}{item['msg']} (it is {_shown(item['input'])})")
    return lines


def _shown(value: object) -> str:
    """A value of a recipe as YAML has it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return reprlib.repr(value)
