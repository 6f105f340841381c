"""Keys of a recipe that hold settings of their own: calibration, hessian, target, layer, fragile,
allocation and tune."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from vqllm.core.protocols import Settings
from vqllm.recipes.parts import CodecPart, StagePart

SkippedKind = Literal["routers", "few_rows", "larger"]
"""The first two: `vqllm.plan.kept`; the last: `vqllm.plan.selection`."""

MOST_TOKENS = 1 << 31
"""Of all calibration sequences together: their int64 ids alone are 17 GB."""


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
    shrinkage: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="what entries of H off the diagonal are multiplied by, in the basis in which "
        "weights are coded; 1 leaves them as they are",
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
    expert_shrinkage: float = Field(
        default=0.5,
        ge=0,
        description="of a mixture's experts: the Hessian of an expert with n tokens and C columns "
        "is mixed with a smoother one, of all experts or a multiple of I, as n to "
        "expert_shrinkage * C",
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
    codec: CodecPart


class Allocation(Settings):
    """A budget of bits, and the codecs among which each linear gets its own."""

    bits: float = Field(
        gt=0,
        le=16,
        description="mean bits per weight of the quantized linears, scales, tables and signs "
        "counted",
    )
    codecs: tuple[CodecPart, ...] = Field(
        min_length=2,
        description="codecs to choose from; one without `type` changes the keys that it has of "
        "the recipe's `codec`",
    )


class Stages(Settings):
    """What is tuned when all linears are rounded, on which text."""

    calibration: Calibration = Calibration(length=256, sequences=512)
    stages: tuple[StagePart, ...] = Field(
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
