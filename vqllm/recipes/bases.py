"""`base: NAME` in a recipe: it is merged over that recipe, before it is validated.

    base      codec: {type: trellis, bits: 2, state_bits: 12}    skip: [lm_head]
    own       codec: {bits: 3}                                   skip: []
    merged    codec: {type: trellis, bits: 3, state_bits: 12}    skip: []

Mappings merge key by key, at every depth. Everything else is replaced; so is a list as a whole, and
null is a value like others. A part with another `type` than the base's is another part and replaces
it as a whole.
"""

import os
from pathlib import Path
from typing import Any

from vqllm.core.protocols import JSON
from vqllm.core.registry import unknown
from vqllm.errors import RecipeError
from vqllm.recipes.schema import RECIPE_VERSION
from vqllm.recipes.shipped import QUANTIZE, TUNE, Kind
from vqllm.recipes.yaml_text import read_yaml

NOT_INHERITED = ("name", "description")
"""Two recipes that differ have names of their own."""


def merge(base: Any, own: Any) -> Any:
    """`own` merged over `base`; neither is changed."""
    if not isinstance(base, dict) or not isinstance(own, dict):
        return own
    if own.get("type", base.get("type")) != base.get("type"):
        return own
    return {**base, **{key: merge(base.get(key), value) for key, value in own.items()}}


def read(kind: Kind[Any], name_or_file: str | Path) -> JSON:
    """What the recipe of a shipped name or in a file says, merged over its base."""
    name = str(name_or_file)
    file = kind.shipped().get(name, Path(name))
    if not os.path.isfile(file):
        message = unknown(kind.noun, name, list(kind.shipped()))
        raise RecipeError(f"{message} A path to a YAML file works too; there is no such file.")
    return merged_over_base(kind, read_yaml(file), name, (file,))


def merged_over_base(
    kind: Kind[Any], values: Any, origin: str, files: tuple[Path, ...] = ()
) -> JSON:
    """A recipe merged over the one that its `base` names, which is merged over its own base first.

    Args:
        kind: what the recipe is, and its base has to be.
        values: what the recipe itself says.
        origin: what messages call it.
        files: its file, last, and before it those whose base it is; none for a dictionary.
    """
    _check_head(values, origin)
    if "base" not in values:
        return values
    place = f"{origin}: base: {values['base']}"
    file = _file_of_base(kind, values["base"], origin, files)
    if file.resolve() in [above.resolve() for above in files]:
        circle = " -> ".join(map(str, (*files, file)))
        raise RecipeError(f"{place} goes in a circle: {circle}. Take `base` out of one of them.")
    base = merged_over_base(kind, read_yaml(file), str(file), (*files, file))
    _check_kind(kind, base, place)
    inherited = {key: value for key, value in base.items() if key not in NOT_INHERITED}
    own = {key: value for key, value in values.items() if key != "base"}
    return merge(inherited, own)


def _check_head(values: Any, origin: str) -> None:
    """That it is a recipe of the version that this code reads."""
    if not isinstance(values, dict):
        raise RecipeError(f"{origin} holds {type(values).__name__}, expected a mapping of keys")
    version = values.get("version", RECIPE_VERSION)
    if version != RECIPE_VERSION:
        raise RecipeError(
            f"{origin} has recipe version {version!r}; this vqllm reads version {RECIPE_VERSION}. "
            "Install a newer vqllm, or write the recipe in the version it reads."
        )


def _file_of_base(kind: Kind[Any], name: Any, origin: str, files: tuple[Path, ...]) -> Path:
    """The file of a shipped recipe, or one by its path from the folder of the recipe's own file."""
    if not isinstance(name, str):
        raise RecipeError(
            f"{origin}: base: expected the name of a shipped {kind.noun}, or a path to a YAML file "
            f"(it is {name!r})"
        )
    # The other kind is found too, so that the message can be that it is of the other kind.
    shipped = {**QUANTIZE.shipped(), **TUNE.shipped(), **kind.shipped()}
    if name in shipped:
        return shipped[name]
    message = f"{origin}: base: {unknown(kind.noun, name, list(kind.shipped()))}"
    if not files:
        raise RecipeError(
            f"{message} In a dictionary `base` is a shipped name; write the recipe into a file to "
            "give it another file as base."
        )
    file = files[-1].parent / name
    if not os.path.isfile(file):
        raise RecipeError(f"{message} A path to a YAML file works too; there is no {file}.")
    return file


def _check_kind(kind: Kind[Any], base: JSON, place: str) -> None:
    """That the base is no recipe of the other kind, by keys that only those have."""
    other = TUNE if kind is QUANTIZE else QUANTIZE
    own_keys, other_keys = kind.schema.model_fields.keys(), other.schema.model_fields.keys()
    foreign = sorted((other_keys - own_keys) & base.keys())
    if foreign:
        raise RecipeError(
            f"{place} is a recipe of {other.command}, because it has {', '.join(foreign)}; the "
            f"base of a recipe of {kind.command} is another one of {kind.command}. `vqllm recipes` "
            "lists both."
        )
