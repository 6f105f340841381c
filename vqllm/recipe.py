"""The recipe: all of what is to be done to a model, as one frozen object and one YAML file."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from vqllm import resources
from vqllm.codecs import CODECS
from vqllm.errors import RecipeError
from vqllm.registry import Registry, unknown
from vqllm.rounding import ROUNDINGS
from vqllm.transforms import TRANSFORMS
from vqllm.types import JSON, Codec, Part, Rounding, Transform

RECIPE_VERSION = 1


def _build(registry: Registry[Any]) -> BeforeValidator:
    """Turn `{type: name, ...}` into the part registered as `name`."""

    def build(value: object) -> object:
        if not isinstance(value, dict):
            return value
        if "type" not in value:
            raise ValueError(f"a {registry.kind} needs a `type`: one of {', '.join(registry)}")
        try:
            return registry.get(value["type"]).model_validate(value)
        except RecipeError as error:
            raise ValueError(str(error)) from error

    return BeforeValidator(build)


def _both_sides(value: object) -> object:
    """`side: both` is two transforms, first of the input side, then of the output side."""
    if not isinstance(value, list | tuple):
        return value
    parts: list[object] = []
    for part in value:
        if isinstance(part, dict) and part.get("side") == "both":
            parts += [{**part, "side": "in"}, {**part, "side": "out"}]
        else:
            parts.append(part)
    return parts


class Section(BaseModel):
    """A frozen group of settings. An unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Calibration(Section):
    """Which text the Hessians are measured on."""

    source: tuple[str, ...] = Field(
        default=("self",),
        description="`self` (the model's own samples), files, folders or datasets ids",
    )
    sequences: int | None = Field(
        default=None,
        ge=1,
        description="number of sequences; by default 128, or 64 where all are the model's own "
        "samples",
    )
    length: int = Field(default=512, ge=2, description="tokens of a sequence")

    @property
    def num_sequences(self) -> int:
        """`sequences`, or its default.

        Samples take longer than all else where there are many, and gain little: the demo model at 2
        bits had a ratio of 3.60 after 64 and of 3.61 after 128 (12 windows of WikiText-2).
        """
        if self.sequences is not None:
            return self.sequences
        return 64 if set(self.source) == {"self"} else 128

    @field_validator("source", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class Hessian(Section):
    """How H = E[x xᵀ] is measured and made positive definite."""

    damping: float = Field(
        default=0.01, gt=0, le=10, description="added to the diagonal, relative to mean(diag H)"
    )
    refresh: Literal["group", "layer"] = Field(
        default="group",
        description="measure each input group after the groups before it in the layer are "
        "quantized (group), or all groups of a layer at once (layer)",
    )


class Recipe(Section):
    """What `vqllm quantize` does, except to which model and where."""

    version: Literal[1] = RECIPE_VERSION
    name: str
    description: str = ""
    seed: int = Field(default=0, ge=0)
    calibration: Calibration = Calibration()
    hessian: Hessian = Hessian()
    transforms: Annotated[
        tuple[Annotated[SerializeAsAny[Transform], _build(TRANSFORMS)], ...],
        BeforeValidator(_both_sides),
    ] = ()
    codec: Annotated[SerializeAsAny[Codec], _build(CODECS)]
    rounding: Annotated[SerializeAsAny[Rounding], _build(ROUNDINGS)]
    skip: tuple[str, ...] = Field(
        default=(),
        description="regular expressions; linears whose full name matches stay as they are",
    )

    @field_validator("skip")
    @classmethod
    def _valid_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return patterns

    @model_validator(mode="after")
    def _parts_fit(self) -> "Recipe":
        try:
            self.rounding.check(self.codec)
        except RecipeError as error:
            raise ValueError(str(error)) from error
        return self

    def to_dict(self) -> JSON:
        """JSON values with every field present."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def from_dict(values: JSON, origin: str) -> Recipe:
    """Validate a recipe; RecipeError names each wrong key with its place."""
    if not isinstance(values, dict):
        raise RecipeError(f"{origin} holds {type(values).__name__}, expected a mapping of keys")
    version = values.get("version", RECIPE_VERSION)
    if version != RECIPE_VERSION:
        raise RecipeError(
            f"{origin} has recipe version {version!r}; this vqllm reads version {RECIPE_VERSION}. "
            "Install a newer vqllm, or write the recipe in the version it reads."
        )
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{origin} is not a valid recipe:\n{_explain(error)}") from error


def load(name_or_file: str | Path, changes: tuple[str, ...] = ()) -> Recipe:
    """A recipe by name (shipped) or file, with `key=value` changes applied before validation.

    Args:
        name_or_file: a name that `available` lists, or a path to a YAML file.
        changes: `dotted.key=value`, the value in YAML; list items by their index.
    """
    path = Path(name_or_file)
    shipped = available()
    if str(name_or_file) in shipped:
        path = shipped[str(name_or_file)]
    elif not path.is_file():
        message = unknown("recipe", str(name_or_file), list(shipped))
        raise RecipeError(f"{message} A path to a YAML file works too; there is no such file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if isinstance(values, dict):
        for change in changes:
            _apply(values, change)
    return from_dict(values, str(name_or_file))


BEST = {2: "e8p-2bit", 3: "e8p-3bit", 4: "e8p-4bit"}
"""The shipped recipe of lowest perplexity at each number of bits; the table in README.md says
which were compared."""


def best(bits: int) -> str:
    """Name of the best recipe for a number of bits."""
    if bits not in BEST:
        raise RecipeError(
            f"--bits {bits}: there is a best recipe for {', '.join(map(str, BEST))} bits. "
            "Name another one with --recipe (vqllm recipes lists them)."
        )
    return BEST[bits]


def available() -> dict[str, Path]:
    """The shipped recipes by name."""
    return {path.stem: path for path in sorted(resources.recipes_dir().glob("*.yaml"))}


def fields_of(part: type[Part]) -> dict[str, str]:
    """Option names of a part with their default and description, for listings."""
    lines = {}
    for name, field in part.model_fields.items():
        if name != "type":
            default = "required" if field.is_required() else f"default {field.default!r}"
            lines[field.alias or name] = f"{default}. {field.description or ''}".rstrip()
    return lines


def _apply(values: JSON, change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {change!r}: expected key=value, for example hessian.damping=0.02")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {change!r}: the value is not YAML: {error}") from error
    *parents, last = key.split(".")
    place: Any = values
    for part in parents:
        if isinstance(place, list) and part.isdigit() and int(part) < len(place):
            place = place[int(part)]
        elif isinstance(place, dict):
            place = place.setdefault(part, {})
        else:
            raise RecipeError(f"--set {change!r}: {part!r} leads nowhere in this recipe")
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise RecipeError(f"--set {change!r}: {last!r} leads nowhere in this recipe")


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        place = ".".join(str(step) for step in item["loc"]) or "recipe"
        if item["type"] == "extra_forbidden":
            lines.append(f"  {place}: unknown key")
        elif item["type"] == "missing":
            lines.append(f"  {place}: missing")
        else:
            lines.append(f"  {place}: {item['msg'].removeprefix('Value error, ')}")
    return "\n".join(lines)
