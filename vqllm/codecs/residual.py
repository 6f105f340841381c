"""Sums of codecs: each stage codes what the stages before it left over.

Coding greedily, stage by stage, is not nearest: the best code of the sum often begins with a
second-best code of the first stage. `encode` therefore keeps a beam of partial sums. With the
beam the best scales of the stages differ from those of greedy coding, so those of the E8
codebooks are chosen for the sum.

    distortion of a unit Gaussian                   greedy stages   greedy, joint scales   beam
    e8p + e8p    4 bits                             TBD
    e81b + e8p   3 bits, coarse stage first
    e8p + e81b   3 bits, fine stage last

Source: residual vector quantization; the E8 pairs with other scales and greedy coding in QuIP#,
arXiv 2402.04396, section 4.
"""

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import Tensor

from vqllm.codecs.base import CODECS, SearchableCodec, check_finite
from vqllm.codecs.e8p import LatticeCodec
from vqllm.errors import RecipeError
from vqllm.types import Codec, State
from vqllm_kernels.residual.reference import stage_tensors
from vqllm_kernels.residual.spec import ResidualSpec

_GAUSSIAN_SCALES: dict[tuple[str, ...], tuple[float, ...]] = {
    ("e81b", "e8p"): (1.98, 0.55),
    ("e8p", "e81b"): (1.0, 0.555),
    ("e8p", "e8p"): (1.1, 0.305),
}
"""Scales over the root mean square of the weights, by stages."""
_CHUNK = 1 << 14
"""Tiles at a time, so that a beam of them takes little memory."""
_DEFAULT_BEAM = 6


def _build_stages(value: object) -> object:
    """Turn `{type: name, ...}` into the codec registered as `name`."""
    if not isinstance(value, list | tuple):
        raise RecipeError(f"codec residual: `stages` is {value!r}; needed is a list of codecs")
    return tuple(_build_stage(stage) for stage in value)


def _build_stage(stage: Any) -> Codec:
    if isinstance(stage, Codec):
        return stage
    if not isinstance(stage, dict) or "type" not in stage:
        raise RecipeError(
            f"codec residual: stage {stage!r} has no `type`; allowed are {', '.join(CODECS)}"
        )
    return CODECS.get(stage["type"]).model_validate(stage)


@CODECS.register("residual")
class Residual(Codec):
    """The sum of two or more codecs with the same tile."""

    weighted: ClassVar[bool] = True

    type: Literal["residual"] = "residual"
    stages: Annotated[
        tuple[SerializeAsAny[Codec], ...], BeforeValidator(_build_stages)
    ] = Field(description="the codecs that are added, the coarsest first")
    beam: int | None = Field(
        None,
        ge=1,
        le=64,
        description=f"partial sums kept while searching for the code of a tile; 1 codes stage by "
        f"stage; null is {_DEFAULT_BEAM}, or 1 where a stage cannot be searched (uniform)",
    )
