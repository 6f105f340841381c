"""Keys of a recipe for the two matrices with a row for every token: embeddings and head."""

from pydantic import Field, model_validator

from vqllm.core.protocols import OutputRounding, Settings
from vqllm.errors import RecipeError
from vqllm.recipes.parts import CodecPart, RoundingPart, TransformParts
from vqllm.rounding.ldlq import LDLQ
from vqllm.rounding.nearest import Nearest
from vqllm_kernels.linear import LinearSpec


class Vocabulary(Settings):
    """How a matrix with a row for every token is stored: the input embedding or the output head."""

    codec: CodecPart
    transforms: TransformParts = Field(
        default=(), description="of the input side only: the others mix rows"
    )
    rounding: RoundingPart

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

    rounding: RoundingPart = Nearest()

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

    rounding: RoundingPart = LDLQ()
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
