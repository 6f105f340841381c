"""Types of the fields that hold parts: `{type: name, ...}` in a recipe, an object of the class that
is registered as `name` in Python."""

from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, ValidationError

from vqllm.codecs import CODECS
from vqllm.core.protocols import Codec, Rounding, Transform, Tuning
from vqllm.core.registry import Registry
from vqllm.errors import RecipeError
from vqllm.recipes.mistakes import mistakes
from vqllm.rounding import ROUNDINGS
from vqllm.transforms import TRANSFORMS
from vqllm.tuning import MODEL_TUNINGS, TUNINGS
from vqllm.tuning.base import ModelTuning


def _built_from(registry: Registry[Any]) -> BeforeValidator:
    """Turns `{type: name, ...}` into the part registered as `name`."""

    def build(value: object) -> object:
        if not isinstance(value, dict):
            return value
        if "type" not in value:
            raise ValueError(f"a {registry.kind} needs a `type`: one of {', '.join(registry)}")
        try:
            return registry.get(str(value["type"])).model_validate(value)
        except ValidationError as error:
            raise ValueError("; ".join(mistakes(error))) from error
        except RecipeError as error:
            raise ValueError(str(error)) from error

    return BeforeValidator(build)


def _both_sides_split(value: object) -> object:
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


CodecPart = Annotated[SerializeAsAny[Codec], _built_from(CODECS)]
RoundingPart = Annotated[SerializeAsAny[Rounding], _built_from(ROUNDINGS)]
TuningPart = Annotated[SerializeAsAny[Tuning], _built_from(TUNINGS)]
StagePart = Annotated[SerializeAsAny[ModelTuning], _built_from(MODEL_TUNINGS)]
TransformParts = Annotated[
    tuple[Annotated[SerializeAsAny[Transform], _built_from(TRANSFORMS)], ...],
    BeforeValidator(_both_sides_split),
]
