"""The recipe: all of what is to be done to a model, as one frozen object and one YAML file."""

import re
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from vqllm.core import local_paths
from vqllm.core.protocols import JSON, Codec, Part, Settings
from vqllm.errors import RecipeError
from vqllm.recipes.parts import CodecPart, RoundingPart, TransformParts, TuningPart
from vqllm.recipes.sections import (
    Allocation,
    Calibration,
    Fragile,
    Hessian,
    LayerTraining,
    SkippedKind,
    Stages,
    Target,
)
from vqllm.recipes.vocabulary import Embeddings, Head, Vocabulary

RECIPE_VERSION = 1


class TuningRecipe(Stages):
    """What `vqllm tune` does to a quantized model."""

    version: Literal[1] = RECIPE_VERSION
    name: str
    description: str = ""
    seed: int = Field(default=0, ge=0)

    def to_dict(self) -> JSON:
        """JSON values with every field present."""
        return self.model_dump(mode="json")

    def to_yaml(self, with_paths: bool = True) -> str:
        return _yaml(self.to_dict(), with_paths)


class Recipe(Settings):
    """What `vqllm quantize` does, except to which model and where."""

    version: Literal[1] = RECIPE_VERSION
    name: str
    description: str = ""
    seed: int = Field(default=0, ge=0)
    calibration: Calibration = Calibration()
    hessian: Hessian = Hessian()
    target: Target = Target()
    transforms: TransformParts = ()
    codec: CodecPart
    rounding: RoundingPart
    tuning: tuple[TuningPart, ...] = Field(
        default=(), description="steps after rounding, of the linears in the layers"
    )
    tune: Stages | None = Field(
        default=None,
        description="stages of `vqllm tune` that follow when all linears are rounded, and their "
        "text, whose source is that of `calibration` here; null tunes nothing",
    )
    layer: LayerTraining | None = Field(
        default=None,
        description="training of each layer between the roundings of its input groups, against the "
        "original layer's output; null trains nothing",
    )
    fragile: Fragile | None = Field(
        default=None,
        description="another codec for linears that the codec loses too much of; null codes all "
        "alike",
    )
    allocation: Allocation | None = Field(
        default=None,
        description="a codec for every linear, chosen for the least expected KL divergence within "
        "a budget of bits, which takes a pass with gradients; null gives all the same `codec`",
    )
    embeddings: Embeddings | None = Field(
        default=None,
        description="codec, transforms of the input side and rounding of the input embedding; null "
        "leaves it as it is",
    )
    head: Head | None = Field(
        default=None,
        description="the same of the output head; an embedding that is tied to it (one matrix) is "
        "stored as the head is, and needs both keys",
    )
    skip: tuple[str, ...] = Field(
        default=(),
        description="regular expressions; linears whose full name matches stay as they are",
    )
    skip_kinds: tuple[SkippedKind, ...] = Field(
        default=("routers", "few_rows", "larger"),
        description="kinds of linears that stay as they are, whatever their names: routers, which "
        "decide which experts run; linears of few rows, such as the gate of a shared expert; those "
        "that would be larger than they are, since their tables are. [] quantizes all of them",
    )

    tensor_parallel: int = Field(
        default=1,
        ge=1,
        description="number of processes that are to serve the model without gathering activations "
        "inside of a layer; as many as divide it can as well. Hadamard transforms end where the "
        "part of a process does. 1 mixes all features",
    )

    @model_validator(mode="before")
    @classmethod
    def _codecs_in_full(cls, values: Any) -> Any:
        """`allocation.codecs` without `type` are changes of `codec`: they get its other keys."""
        if not isinstance(values, dict) or not isinstance(values.get("allocation"), dict):
            return values
        codec, allocation = values.get("codec"), values["allocation"]
        codecs = allocation.get("codecs")
        if not isinstance(codec, dict) or not isinstance(codecs, list | tuple):
            return values
        full = [
            {**codec, **own} if isinstance(own, dict) and "type" not in own else own
            for own in codecs
        ]
        return {**values, "allocation": {**allocation, "codecs": full}}

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
            for codec in self.codecs:
                self.rounding.check(codec)
                for tuning in self.tuning:
                    tuning.check(codec)
            if self.fragile is not None:
                self.rounding.check(self.fragile.codec)
        except RecipeError as error:
            raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def _one_source(self) -> "Recipe":
        if self.tune is None:
            return self
        own, source = self.tune.calibration.source, self.calibration.source
        if own not in (source, Calibration().source):
            raise ValueError(
                f"tune.calibration.source: {', '.join(own)} is another text than that of "
                "calibration.source, which the stages take: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _training_fits(self) -> "Recipe":
        if self.layer is None:
            return self
        if "weights" in self.layer.train and self.target.of != "weights":
            raise ValueError(
                f"target.of: {self.target.of} and layer.train with weights both make weights right "
                "for inputs that have drifted, and together would do it twice; use target.of: "
                "weights, or layer.train: [rows, vectors]"
            )
        if set(self.layer.train) == {"weights"} and self.hessian.refresh == "layer":
            raise ValueError(
                "layer.train: [weights] with hessian.refresh: layer leaves nothing to train, "
                "because all groups are rounded at once; use hessian.refresh: group"
            )
        if self.calibration.num_sequences < 2:
            raise ValueError(
                "layer: training holds sequences out and needs at least 2 calibration.sequences"
            )
        return self

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """All codecs that linears in the layers may get, fragile ones aside."""
        return (self.codec,) if self.allocation is None else self.allocation.codecs

    def with_codec(self, codec: Codec) -> "Recipe":
        """This recipe for a linear that got `codec`."""
        return self.model_copy(update={"codec": codec, "allocation": None})

    def for_fragile(self) -> "Recipe":
        """This recipe with the codec of fragile linears, and without tuning."""
        assert self.fragile is not None, "the recipe has no such key"
        update = {"codec": self.fragile.codec, "fragile": None, "tuning": ()}
        return self.model_copy(update=update)

    def of(self, part: Vocabulary) -> "Recipe":
        """This recipe with the codec, transforms and rounding of the embedding or the head, and
        without tuning."""
        own = {name: getattr(part, name) for name in Vocabulary.model_fields}
        damping = getattr(part, "damping", None)
        if damping is not None:
            own["hessian"] = self.hessian.model_copy(update={"damping": damping})
        alike = {"tuning": (), "target": Target(), "fragile": None, "allocation": None}
        return self.model_copy(update={**alike, **own})

    def rounding_only(self) -> "Recipe":
        """This recipe without the stages that follow when all linears are rounded."""
        return self.model_copy(update={"tune": None})

    def tuning_only(self) -> TuningRecipe:
        """The recipe of those stages, with the text and the seed of this one."""
        assert self.tune is not None, "the recipe has no such key"
        text = self.tune.calibration.model_copy(update={"source": self.calibration.source})
        given = {key: getattr(self.tune, key) for key in Stages.model_fields}
        return TuningRecipe(**{**given, "name": self.name, "seed": self.seed, "calibration": text})

    def to_dict(self) -> JSON:
        """JSON values with every field present, but `skip_kinds`, `tensor_parallel` and
        `hessian.shrinkage` where they are the default: the recipes in checkpoints and journals of
        earlier versions do not have them either."""
        values = self.model_dump(mode="json")
        for key in ("skip_kinds", "tensor_parallel"):
            if getattr(self, key) == Recipe.model_fields[key].default:
                del values[key]
        if self.hessian.shrinkage == Hessian.model_fields["shrinkage"].default:
            del values["hessian"]["shrinkage"]
        return values

    def to_yaml(self, with_paths: bool = True) -> str:
        return _yaml(self.model_dump(mode="json"), with_paths)


def _yaml(values: JSON, with_paths: bool) -> str:
    """Every key of a recipe as YAML; of local paths only names unless `with_paths`."""
    shown = values if with_paths else local_paths.in_values(values)
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)


def fields_of(part: type[Part]) -> dict[str, str]:
    """Option names of a part with their default and description, for listings."""
    lines = {}
    for name, field in part.model_fields.items():
        if name != "type":
            default = "required" if field.is_required() else f"default {field.default!r}"
            lines[field.alias or name] = f"{default}. {field.description or ''}".rstrip()
    return lines
