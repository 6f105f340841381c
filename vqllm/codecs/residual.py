"""Sums of codecs: each stage codes the residual of the stages before it.

Coding greedily, stage by stage, does not find the nearest sum: the best code of the sum often
begins with a second-best code of the first stage. So `encode` searches with a beam of partial sums.
With the beam the best scales of the stages differ from those of greedy coding, so those of the E8
codebooks are chosen for the sum.

Mean squared error of 2^20 unit Gaussian weights, and speed in 10^6 weights a second of time on one
core (of two, both busy with other work):

    stages               bits   QuIP#     beam 1         beam 2         beam 4         beam 6
    e81b + e8p           3      0.02945   0.02908  6.9   0.02725  2.9   0.02643  1.7   0.02626  1.2
    e8p + e81b           3                0.03066  6.7   0.02833  2.0   0.02829  1.4   0.02826  1.0
    e8p + e8p            4      0.00958   0.00839  6.2   0.00783  1.8   0.00752  1.2   0.00744  0.9
    d4 + d4              4                0.01043  2.6   0.00964  2.0   0.00964  1.1   0.00964  0.8
    e81b + e8p + e8p     5                0.00269  4.2   0.00236  1.1   0.00215  0.5   0.00207  0.3

The QuIP# column is its scales, coded greedily. At 3 bits the coarse stage is the small codebook:
the balls of E8P around 256 coarse points overlap little, whereas the 240 roots around each point
of E8P are 120 pairs that lead to the same places.

Source: residual vector quantization; the E8 pairs with other scales and greedy coding in QuIP#,
arXiv 2402.04396, section 4.
"""

from functools import reduce
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import Tensor

from vqllm.codecs.base import (
    CODECS,
    ScaledCodec,
    SearchableCodec,
    build_part,
    check_finite,
    weigh,
)
from vqllm.core.protocols import Codec, Point, State
from vqllm.errors import RecipeError
from vqllm_kernels.residual.reference import stage_tensors
from vqllm_kernels.residual.spec import ResidualSpec

_GAUSSIAN_SCALES: dict[tuple[str, ...], tuple[float, ...]] = {
    ("d4", "d4"): (1.0, 0.277),
    ("e81b", "e8p"): (1.98, 0.56),
    ("e8p", "e81b"): (1.0, 0.565),
    ("e8p", "e8p"): (1.12, 0.305),
    ("e81b", "e8p", "e8p"): (2.19, 0.647, 0.169),
}
"""Scales of the stages over the root mean square of the weights, found by coordinate descent in
steps of 1.5 % on 2^17 Gaussian weights with the default beam."""
_CHUNK = 1 << 11
"""Tiles at a time, so that a beam of them takes little memory."""
_DEFAULT_BEAM = 6


def _point(*stages: str, mse: float, num_weights: int = 1 << 20) -> Point:
    return Point(
        label=" + ".join(stages),
        options={"stages": [{"type": stage} for stage in stages]},
        mse=mse,
        source="measured",
        num_weights=num_weights,
    )


def _build_stages(value: object) -> object:
    """Turn `{type: name, ...}` into the codec registered as `name`."""
    if not isinstance(value, list | tuple):
        raise RecipeError(f"codec residual: `stages` is {value!r}; needed is a list of codecs")
    return tuple(build_part("residual", "stage", stage) for stage in value)


@CODECS.register("residual")
class Residual(Codec):
    """The sum of two or more codecs with the same tile."""

    weighted: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    points: ClassVar[tuple[Point, ...]] = (
        _point("e81b", "e8p", mse=0.0264),
        _point("e8p", "e81b", mse=0.0286),
        _point("e8p", "e8p", mse=0.0075),
        _point("d4", "d4", mse=0.0097),
        _point("e81b", "e8p", "e8p", mse=0.00216, num_weights=1 << 18),
    )

    type: Literal["residual"] = "residual"
    stages: Annotated[tuple[SerializeAsAny[Codec], ...], BeforeValidator(_build_stages)] = Field(
        description="the codecs that are added, the coarsest first"
    )
    beam: int | None = Field(
        None,
        ge=1,
        le=64,
        description="partial sums kept while searching for the code of a tile; 1 codes stage by "
        f"stage; null is {_DEFAULT_BEAM}, or 1 where a stage cannot be searched (uniform)",
    )

    @model_validator(mode="after")
    def _stages_fit(self) -> "Residual":
        if len(self.stages) < 2:
            raise RecipeError(
                f"codec residual: {len(self.stages)} stages; needed are two or more codecs"
            )
        tiles = [stage.tile for stage in self.stages]
        if len(set(tiles)) > 1:
            raise RecipeError(
                f"codec residual: stages with tiles {tiles}; stages that are added must have the "
                "same tile"
            )
        if any(isinstance(stage, Residual) for stage in self.stages):
            raise RecipeError("codec residual: a stage is itself residual; list its stages instead")
        if any(stage.refit_cols is not None for stage in self.stages):
            raise RecipeError(
                "codec residual: a stage fits codebooks while columns are coded (fit per_group), "
                "which only a codec by itself can; set its fit to once"
            )
        if self.beam is not None and self.beam > 1 and not self._searchable:
            names = [s.type for s in self.stages if not isinstance(s, SearchableCodec)]
            raise RecipeError(
                f"codec residual: beam {self.beam} with {', '.join(names)}, which cannot list the "
                "codes near a tile; set beam to 1 or null"
            )
        return self

    @property
    def _searchable(self) -> bool:
        return all(isinstance(stage, SearchableCodec) for stage in self.stages)

    @property
    def tile(self) -> tuple[int, int]:
        return self.stages[0].tile

    @property
    def num_symbols(self) -> int:
        return sum(stage.num_symbols for stage in self.stages)

    def spec(self) -> ResidualSpec:
        return ResidualSpec(stages=tuple(stage.spec() for stage in self.stages))

    def fit(self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator) -> State:
        """The state of stage i under `s{i}_` + name."""
        check_finite(X_IJE, self)
        joint = self._jointly_scaled()
        if joint:
            states = [stage.fit(X_IJE, weight_IJE, generator) for stage in joint]
        else:
            # Each stage is fitted to the residual that the fitted stages before it leave.
            states, rest_IJE = [], X_IJE
            for i, stage in enumerate(self.stages):
                if i:
                    codes_IJM = self.stages[i - 1].encode(rest_IJE, states[-1])
                    rest_IJE = rest_IJE - self.stages[i - 1].decode(codes_IJM, states[-1])
                states.append(stage.fit(rest_IJE, weight_IJE, generator))
        return {f"s{i}_{k}": v for i, state in enumerate(states) for k, v in state.items()}

    def _jointly_scaled(self) -> list[ScaledCodec]:
        """The stages with the scales of `_GAUSSIAN_SCALES`; empty where there are none for them."""
        scales = _GAUSSIAN_SCALES.get(tuple(stage.type for stage in self.stages), ())
        scaled = []
        for stage, scale in zip(self.stages, scales):
            assert isinstance(stage, ScaledCodec)
            factor = stage.scale_factor * scale / stage.gaussian_scale
            scaled.append(stage.model_copy(update={"scale_factor": factor}))
        return scaled

    def encode(
        self, X_IJE: Tensor, state: State, col: int = 0, weight_E: Tensor | None = None
    ) -> Tensor:
        check_finite(X_IJE, self)
        beam = self.beam or (_DEFAULT_BEAM if self._searchable else 1)
        if beam == 1:
            return self._encode_greedily(X_IJE, state, col, weight_E)
        return self._searched(X_IJE, state, beam, weight_E)[:, :, 0]

    @property
    def lists_codes(self) -> bool:
        return self._searchable

    def shortlist(
        self, X_IJE: Tensor, state: State, num: int, weight_E: Tensor | None = None
    ) -> Tensor:
        check_finite(X_IJE, self)
        if num == 1:
            return self.encode(X_IJE, state, weight_E=weight_E)[:, :, None]
        beam = max(self.beam or _DEFAULT_BEAM, num)
        return self._searched(X_IJE, state, beam, weight_E, num)

    def _searched(
        self, X_IJE: Tensor, state: State, beam: int, weight_E: Tensor | None, num: int = 1
    ) -> Tensor:
        chunks = X_IJE.flatten(0, 1).split(_CHUNK)
        codes = [self._search(x_NE, state, beam, weight_E, num) for x_NE in chunks]
        return torch.cat(codes).unflatten(0, X_IJE.shape[:2])

    def _encode_greedily(
        self, X_IJE: Tensor, state: State, col: int, weight_E: Tensor | None
    ) -> Tensor:
        codes, rest_IJE = [], X_IJE
        for i, stage in enumerate(self.stages):
            own = stage_tensors(state, i)
            codes.append(stage.encode(rest_IJE, own, col, weight_E))
            rest_IJE = rest_IJE - stage.decode(codes[-1], own, col)
        return torch.cat(codes, -1)

    def _search(
        self, x_NE: Tensor, state: State, beam: int, weight_E: Tensor | None, num: int
    ) -> Tensor:
        """Codes of the `num` best sums, [N, num, M], with `beam` partial sums (B) after each stage.

        Each partial sum ends in its best code of the last stage.
        """
        rest_NBE = x_NE[:, None]
        codes_NBM = torch.empty(len(x_NE), 1, 0, dtype=torch.int32, device=x_NE.device)
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, SearchableCodec)
            own, is_last = stage_tensors(state, i), i == len(self.stages) - 1
            # Every partial sum goes on with K codes of this stage: C = B · K longer sums.
            code_NBK = stage.candidates(rest_NBE, own, 1 if is_last else beam, weight_E)
            word_NCE = stage.decode(code_NBK.flatten(1)[..., None], own)
            rest_NCE = rest_NBE.repeat_interleave(code_NBK.shape[2], 1) - word_NCE
            codes_NCM = codes_NBM.repeat_interleave(code_NBK.shape[2], 1)
            codes_NCM = torch.cat((codes_NCM, code_NBK.flatten(1)[..., None]), 2)
            # Those that leave the least (weighted) residual are the partial sums of the next stage.
            error_NCE = rest_NCE if weight_E is None else weigh(rest_NCE, weight_E)
            error_NC = (error_NCE**2).sum(2)
            num_best = min(num if is_last else beam, error_NC.shape[1])
            best_NB = error_NC.topk(num_best, largest=False).indices
            rest_NBE = rest_NCE.take_along_dim(best_NB[..., None], 1)
            codes_NBM = codes_NCM.take_along_dim(best_NB[..., None], 1)
        return codes_NBM

    def decode(self, codes_IJM: Tensor, state: State, col: int = 0) -> Tensor:
        decoded = [
            stage.decode(own_IJM, stage_tensors(state, i), col)
            for i, (stage, own_IJM) in enumerate(zip(self.stages, self._by_stage(codes_IJM)))
        ]
        return reduce(torch.add, decoded)

    def _by_stage(self, codes_IJM: Tensor) -> tuple[Tensor, ...]:
        """The symbols of each stage."""
        return codes_IJM.split([stage.num_symbols for stage in self.stages], -1)

    def streams(self, codes_IJM: Tensor) -> list[Tensor]:
        parts = zip(self.stages, self._by_stage(codes_IJM))
        return [stream for stage, own_IJM in parts for stream in stage.streams(own_IJM)]

    def project(self, state: State) -> State:
        states = [
            stage.project(stage_tensors(state, i)).items() for i, stage in enumerate(self.stages)
        ]
        return {f"s{i}_{k}": v for i, own in enumerate(states) for k, v in own}

    def pack(self, codes_IJM: Tensor, state: State) -> dict[str, Tensor]:
        packed = {}
        for i, (stage, own_IJM) in enumerate(zip(self.stages, self._by_stage(codes_IJM))):
            tensors = stage.pack(own_IJM, stage_tensors(state, i))
            packed |= {f"s{i}_{name}": tensor for name, tensor in tensors.items()}
        return packed

    def unpack(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Tensor, State]:
        codes, states = [], {}
        for i, stage in enumerate(self.stages):
            own_codes, own = stage.unpack(stage_tensors(tensors, i), rows, cols)
            codes.append(own_codes)
            states |= {f"s{i}_{name}": tensor for name, tensor in own.items()}
        return torch.cat(codes, -1), states
