"""The recipe: all of what is to be done to a model, as one frozen object and one YAML file."""

import re
import reprlib
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from vqllm.codecs import CODECS
from vqllm.core.protocols import (
    JSON,
    Codec,
    OutputRounding,
    Part,
    Rounding,
    Settings,
    Transform,
    Tuning,
)
from vqllm.core.registry import Registry
from vqllm.errors import RecipeError
from vqllm.rounding import ROUNDINGS
from vqllm.rounding.ldlq import LDLQ
from vqllm.rounding.nearest import Nearest
from vqllm.transforms import TRANSFORMS
from vqllm.tuning import MODEL_TUNINGS, TUNINGS
from vqllm.tuning.base import ModelTuning
from vqllm_kernels.linear import LinearSpec

RECIPE_VERSION = 1
MOST_TOKENS = 1 << 31
"""Of all calibration sequences together: their int64 ids alone are 17 GB."""


def _build(registry: Registry[Any]) -> BeforeValidator:
    """Turn `{type: name, ...}` into the part registered as `name`."""

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


class Calibration(Settings):
    """Which text the Hessians are measured on."""

    source: tuple[str, ...] = Field(
        default=("self",),
        min_length=1,
        description="`self` (the model's own samples), files, folders or datasets ids",
    )
    sequences: int | None = Field(
        default=None,
        ge=1,
        description="number of sequences; by default 65536 tokens of them, or 32768 where all are "
        "the model's own samples",
    )
    length: int = Field(default=128, ge=2, description="tokens of a sequence")
    """Many short sequences beat few long ones: 32768 tokens of C4 and Wikipedia gave the demo model
    at 2 bits ratios of 3.28 and 3.34 (two seeds) as 64 x 512, of 3.20 and 3.15 as 256 x 128; its
    own samples 3.60 and 3.33."""

    @property
    def num_sequences(self) -> int:
        """`sequences`, or its default.

        Samples take longer than all else where there are many, and gain little: the demo model at 2
        bits had a ratio of 3.60 after 64 of 512 tokens and of 3.61 after 128 (12 windows of
        WikiText-2).
        """
        if self.sequences is not None:
            return self.sequences
        num_tokens = 32768 if set(self.source) == {"self"} else 65536
        return max(1, num_tokens // self.length)

    @field_validator("source", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_in_memory(self) -> "Calibration":
        num_tokens = self.num_sequences * self.length
        if num_tokens > MOST_TOKENS:
            raise ValueError(
                f"{self.num_sequences} sequences of {self.length} tokens are {num_tokens} tokens; "
                f"at most {MOST_TOKENS} are read. Lower calibration.sequences or "
                "calibration.length; a few hundred sequences are usual"
            )
        return self


class Hessian(Settings):
    """How H = E[x xᵀ] is measured and made positive definite."""

    damping: float = Field(
        default=0.01, gt=0, le=10, description="added to the diagonal, relative to mean(diag H)"
    )
    refresh: Literal["group", "layer"] = Field(
        default="group",
        description="measure each input group after the groups before it in the layer are "
        "quantized (group), or all groups of a layer at once (layer)",
    )
    weights: Literal["none", "output"] = Field(
        default="none",
        description="how much a token counts in H: all the same (none), or as much as the model's "
        "predictions depend on the outputs of the linears there (output), which takes a pass with "
        "gradients through the unquantized model",
    )
    power: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="exponent of the weights: 1 is the Fisher information, which few tokens make "
        "up",
    )


class Target(Settings):
    """What the quantized weights of a linear are to reproduce; formulas in
    `vqllm.quantization.target`."""

    of: Literal["weights", "outputs", "residual"] = Field(
        default="weights",
        description="the linear's weights (weights); its outputs in the original model, from the "
        "input that it has after layers that are quantized (outputs); the sum of the residual "
        "stream and its output in the original model, where the output is added to the stream, "
        "and outputs elsewhere (residual). The last two run the original model as well",
    )
    damping: float = Field(
        default=0.1,
        gt=0,
        le=10,
        description="added to the diagonal of the Hessian that the target is computed with, "
        "relative to its mean",
    )


class LayerTraining(Settings):
    """How a decoder layer is trained after each input group of it is rounded."""

    train: tuple[Literal["weights", "rows", "vectors"], ...] = Field(
        ("weights", "rows", "vectors"),
        min_length=1,
        description="weights: those not yet rounded; rows: a scale for every output of every "
        "rounded linear; vectors: norms and biases",
    )
    aim: Literal["original", "own"] = Field(
        "original",
        description="what the layer's output is to be: that of the unquantized layer for the input "
        "that it has in the original model (original), which runs beside, or for the input that it "
        "has after quantized layers (own)",
    )
    steps: int = Field(48, ge=1, description="steps of Adam after each group")
    batch: int = Field(8, ge=1, description="sequences a step")
    rate: float = Field(
        3e-3, gt=0, le=1, description="step size for scales and vectors, relative to them"
    )
    weight_rate: float = Field(
        3e-3, gt=0, le=1, description="that for weights, relative to their root mean square"
    )
    held_out: float = Field(
        0.1, gt=0, le=0.5, description="share of the sequences that the best state is chosen by"
    )


class Fragile(Settings):
    """Which linears are coded again, with more bits, and how. The report names them."""

    above: float = Field(
        gt=0,
        description="proxy loss, the relative error of a linear's outputs, from which on it is "
        "fragile",
    )
    codec: Annotated[SerializeAsAny[Codec], _build(CODECS)]


class Allocation(Settings):
    """A budget of bits, and the codecs among which each linear gets its own."""

    bits: float = Field(
        gt=0,
        le=16,
        description="mean bits per weight of the quantized linears, scales, tables and signs "
        "counted",
    )
    codecs: tuple[Annotated[SerializeAsAny[Codec], _build(CODECS)], ...] = Field(
        min_length=2,
        description="codecs to choose from; one without `type` changes the keys that it has of "
        "the recipe's `codec`",
    )


class Vocabulary(Settings):
    """How a matrix with a row for every token is stored: the input embedding or the output head."""

    codec: Annotated[SerializeAsAny[Codec], _build(CODECS)]
    transforms: Annotated[
        tuple[Annotated[SerializeAsAny[Transform], _build(TRANSFORMS)], ...],
        BeforeValidator(_both_sides),
    ] = Field(default=(), description="of the input side only: the others mix rows")
    rounding: Annotated[SerializeAsAny[Rounding], _build(ROUNDINGS)]

    @model_validator(mode="after")
    def _rows_stand_alone(self) -> "Vocabulary":
        if any(transform.side == "out" for transform in self.transforms):
            raise ValueError(
                "a transform with `side: out` (or both) mixes rows, which are looked up one by "
                "one; use `side: in`"
            )
        # Any size shows it whose rows are many enough for groups of them.
        if not LinearSpec(rows=1 << 17, cols=1024, format=self.codec.spec()).row_wise():
            raise ValueError(
                f"the rows of codec {self.codec.type} with these options cannot be decoded one by "
                "one, because some of what it stores belongs to groups of rows"
            )
        if isinstance(self.rounding, OutputRounding):
            raise ValueError(
                f"rounding {self.rounding.type} needs gradients in the outputs, which are measured "
                "for linears in the layers only; use ldlq"
            )
        try:
            self.rounding.check(self.codec)
        except RecipeError as error:
            raise ValueError(str(error)) from error
        return self


class Embeddings(Vocabulary):
    """How the input embedding is stored."""

    rounding: Annotated[SerializeAsAny[Rounding], _build(ROUNDINGS)] = Nearest()

    @model_validator(mode="after")
    def _nearest(self) -> "Embeddings":
        if not isinstance(self.rounding, Nearest):
            raise ValueError(
                f"rounding {self.rounding.type} needs the Hessian of an input, and an embedding "
                "has none: use nearest. Where it is tied to the head, the rounding of `head` holds"
            )
        return self


class Head(Vocabulary):
    """How the output head is stored, and an embedding that is tied to it."""

    rounding: Annotated[SerializeAsAny[Rounding], _build(ROUNDINGS)] = LDLQ()
    damping: float | None = Field(
        default=None,
        gt=0,
        le=10,
        description="of the Hessian of the head's input; by default hessian.damping, and 1 where "
        "an embedding is tied to the head",
    )

    def tied_damping(self) -> float:
        """`damping` for a matrix that is an embedding too: errors of its looked-up rows count in
        all features alike, as much as those of the head do on average.

        The demo model with layers at 2 bits, 2 windows, ratio of the perplexities with this matrix
        at 4 bits and as it was: 1.043 at 0.01, 1.027 at 0.1, 1.017 at 1, 1.036 at 3.
        """
        return 1.0 if self.damping is None else self.damping


class Stages(Settings):
    """What is tuned when all linears are rounded, on which text."""

    calibration: Calibration = Calibration(length=256, sequences=512)
    stages: tuple[Annotated[SerializeAsAny[ModelTuning], _build(MODEL_TUNINGS)], ...] = Field(
        min_length=1, description="one after the other, each from where the one before it ended"
    )
    teacher: Literal["cached", "live"] = Field(
        default="cached",
        description="cached: the original runs once, layer by layer, and what its head is computed "
        "from is kept in the output folder, 2 bytes a feature and token; live: it stays in memory "
        "and runs along",
    )
    shard: bool = Field(
        default=False,
        description="each of several processes holds a part of the decoded weights, for models "
        "that do not fit on one device",
    )

    @model_validator(mode="after")
    def _is_sharded_whole(self) -> Self:
        if self.shard and self.teacher == "live":
            raise ValueError(
                "shard: a live teacher would be whole in every process; take `teacher: cached`"
            )
        moving = {kind for stage in self.stages for kind in stage.kinds} & {"codebooks", "codes"}
        if self.shard and moving:
            raise ValueError(
                f"shard: splits weights that stay as they are, and {', '.join(sorted(moving))} move"
            )
        readers = [stage.type for stage in self.stages if stage.reads_weights]
        if self.shard and readers:
            raise ValueError(f"shard: splits weights, which {', '.join(readers)} reads whole")
        return self


class TuningRecipe(Stages):
    """What `vqllm tune` does to a quantized model."""

    version: Literal[1] = RECIPE_VERSION
    name: str
    description: str = ""
    seed: int = Field(default=0, ge=0)

    def to_dict(self) -> JSON:
        """JSON values with every field present."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


class Recipe(Settings):
    """What `vqllm quantize` does, except to which model and where."""

    version: Literal[1] = RECIPE_VERSION
    name: str
    description: str = ""
    seed: int = Field(default=0, ge=0)
    calibration: Calibration = Calibration()
    hessian: Hessian = Hessian()
    target: Target = Target()
    transforms: Annotated[
        tuple[Annotated[SerializeAsAny[Transform], _build(TRANSFORMS)], ...],
        BeforeValidator(_both_sides),
    ] = ()
    codec: Annotated[SerializeAsAny[Codec], _build(CODECS)]
    rounding: Annotated[SerializeAsAny[Rounding], _build(ROUNDINGS)]
    tuning: tuple[Annotated[SerializeAsAny[Tuning], _build(TUNINGS)], ...] = Field(
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

    @model_validator(mode="before")
    @classmethod
    def _changes_of_the_codec(cls, values: Any) -> Any:
        """Codecs to allocate that are written as changes of `codec`, in full."""
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
        """Those that linears in the layers may get, fragile ones aside."""
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
        """Those stages."""
        assert self.tune is not None, "the recipe has no such key"
        text = self.tune.calibration.model_copy(update={"source": self.calibration.source})
        given = {key: getattr(self.tune, key) for key in Stages.model_fields}
        return TuningRecipe(**{**given, "name": self.name, "seed": self.seed, "calibration": text})

    def to_dict(self) -> JSON:
        """JSON values with every field present."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def fields_of(part: type[Part]) -> dict[str, str]:
    """Option names of a part with their default and description, for listings."""
    lines = {}
    for name, field in part.model_fields.items():
        if name != "type":
            default = "required" if field.is_required() else f"default {field.default!r}"
            lines[field.alias or name] = f"{default}. {field.description or ''}".rstrip()
    return lines


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
