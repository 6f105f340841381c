"""A few weights of every row stored apart in float16, the rest coded by another codec.

W = S + Ŵ: every row has the same number of outliers S, `share` of its weights. Each takes 16 bits
and those of a column number, beside its code. The other codec is fitted to W − S and codes it, so
that a few large weights do not stretch its range. That helps most where one scale or codebook
serves many weights without a transform. After a Hadamard transform, or on any Gaussian weights,
outliers are not worth their bits (1 % beside E8P: 2.14 dB above Shannon in place of 1.64).

`fit` takes the largest weights of each row. Proxy losses after LDLQ, q_proj and down_proj of layer
5 of the demo model, 192 rows, 0.5 % outliers (uniform: 3.16 bits in place of 3.02):

                                               uniform, 3 bits      kmeans 1x4, 2 bits
    no outliers                                0.00873  0.02961     0.01440  0.06912
    largest |w|                                0.00595  0.02443     0.01271  0.06295
    largest |w| √H_jj                          0.00608  0.02555     0.01309  0.06450
    largest errors without outliers, √H_jj     0.00670  0.02391     0.01354  0.06442

The rounding rule `coordinate` chooses outliers anew, on the true loss.

Source: Behdin et al., "QuantEase", arXiv 2309.01885, section 4 (outliers of the whole matrix, the
largest to begin with).
"""

from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import Tensor

from vqllm.codecs.base import CODECS, build_part, check_finite
from vqllm.core.protocols import Codec, OutlierCodec, Point, State
from vqllm.core.tiles import from_tiles, to_tiles
from vqllm.errors import NumericalError, RecipeError
from vqllm_kernels.sparse import reference
from vqllm_kernels.sparse.spec import SparseSpec

_LARGEST = torch.finfo(torch.float16).max


@CODECS.register("sparse")
class Sparse(OutlierCodec):
    """Another codec, and a few outliers of every row."""

    points: ClassVar[tuple[Point, ...]] = (
        Point(
            label="0.5 % beside uniform, 3 bits",
            options={"base": {"type": "uniform", "bits": 3, "group": None}},
            mse=0.0344,
            source="measured",
        ),
    )

    type: Literal["sparse"] = "sparse"
    share: float = Field(
        0.005, gt=0, lt=1, description="share of the weights of each row stored apart, at least one"
    )
    base: Annotated[  # type: ignore[assignment]
        SerializeAsAny[Codec], BeforeValidator(partial(build_part, "sparse", "base"))
    ] = Field(description="codec of the rest")

    @model_validator(mode="after")
    def _outliers_once(self) -> "Sparse":
        if isinstance(self.base, OutlierCodec):
            raise RecipeError(
                f"codec sparse: the base is {self.base.type}, which stores outliers itself; raise "
                "its share instead"
            )
        return self

    @property
    def tile(self) -> tuple[int, int]:
        return self.base.tile

    @property
    def num_symbols(self) -> int:
        return self.base.num_symbols

    @property
    def weighted(self) -> bool:  # type: ignore[override]
        return self.base.weighted

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return self.base.exact

    @property
    def refit_cols(self) -> int | None:
        return self.base.refit_cols

    def spec(self) -> SparseSpec:
        return SparseSpec(share=self.share, base=self.base.spec())

    def fit(self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator) -> State:
        """`outlier_columns` int32 and `outlier_values` float16, both [I · tile_rows, N].

        Also the state of the base codec, fitted to the rest, under `base_` + name.
        """
        check_finite(X_IJE, self)
        # The base is fitted to the rest after the outliers as float16 has them.
        X_RC = self._rows(X_IJE)
        largest_RN = self._largest(X_IJE.abs())
        S_RC = torch.zeros_like(X_RC).scatter(1, largest_RN, X_RC.gather(1, largest_RN))
        if (largest := float(S_RC.abs().max())) > _LARGEST:
            raise NumericalError(
                f"codec sparse: weights up to {largest:.3g} do not fit float16 outliers (65504). "
                "Scale the weights down with a scaling transform."
            )
        S_IJE = to_tiles(S_RC.half().float(), self.tile)
        return self.with_outliers(S_IJE, self.base.fit(X_IJE - S_IJE, weight_IJE, generator))

    def num_outliers(self, num_tile_cols: int) -> int:
        return reference.num_outliers(self.share, num_tile_cols * self.tile[1])

    def outliers(self, state: State, num_tile_cols: int) -> Tensor:
        return self._outliers(state, 0, num_tile_cols)

    def _outliers(self, state: State, col: int, num_tile_cols: int) -> Tensor:
        first, num_cols = col * self.tile[1], num_tile_cols * self.tile[1]
        S_RC = reference.dense(state["outlier_columns"], state["outlier_values"], first, num_cols)
        return to_tiles(S_RC, self.tile)

    def base_state(self, state: State) -> State:
        return reference.base_tensors(state)

    def with_outliers(self, S_IJE: Tensor, base_state: State) -> State:
        columns_RN = self._largest(S_IJE.abs()).sort(1).values
        values_RN = _half(self._rows(S_IJE).gather(1, columns_RN))
        state = {"outlier_columns": columns_RN.to(torch.int32), "outlier_values": values_RN}
        return state | {reference.PREFIX + name: tensor for name, tensor in base_state.items()}

    def _rows(self, X_IJE: Tensor) -> Tensor:
        """[I · tile_rows, J · tile_cols]."""
        num_tile_rows, num_tile_cols, _ = X_IJE.shape
        tile_rows, tile_cols = self.tile
        return from_tiles(X_IJE, self.tile, num_tile_rows * tile_rows, num_tile_cols * tile_cols)

    def _largest(self, size_IJE: Tensor) -> Tensor:
        """Columns of the largest weights of each row, int64 [I · tile_rows, N]; of equal ones the
        first."""
        num = self.num_outliers(size_IJE.shape[1])
        order = self._rows(size_IJE).argsort(dim=1, descending=True, stable=True)
        return order[:, :num]

    def encode(
        self, X_IJE: Tensor, state: State, col: int = 0, weight_E: Tensor | None = None
    ) -> Tensor:
        check_finite(X_IJE, self)
        rest_IJE = X_IJE - self._outliers(state, col, X_IJE.shape[1])
        return self.base.encode(rest_IJE, self.base_state(state), col, weight_E)

    def decode(self, codes_IJM: Tensor, state: State, col: int = 0) -> Tensor:
        decoded_IJE = self.base.decode(codes_IJM, self.base_state(state), col)
        return decoded_IJE + self._outliers(state, col, codes_IJM.shape[1])

    def refit(self, X_IJE: Tensor, weight_IJE: Tensor | None, state: State, col: int) -> State:
        rest_IJE = X_IJE - self._outliers(state, col, X_IJE.shape[1])
        base_state = self.base.refit(rest_IJE, weight_IJE, self.base_state(state), col)
        return state | {reference.PREFIX + name: t for name, t in base_state.items()}

    def streams(self, codes_IJM: Tensor) -> list[Tensor]:
        return self.base.streams(codes_IJM)

    def project(self, state: State) -> State:
        projected = self.base.project(self.base_state(state))
        own = {
            "outlier_columns": state["outlier_columns"],
            "outlier_values": _half(state["outlier_values"]),
        }
        return own | {reference.PREFIX + name: tensor for name, tensor in projected.items()}

    def pack(self, codes_IJM: Tensor, state: State) -> dict[str, Tensor]:
        num_cols = codes_IJM.shape[1] * self.tile[1]
        packed = self.base.pack(codes_IJM, self.base_state(state))
        by_tile_row = (-1, self.tile[0])
        return {
            **{reference.PREFIX + name: tensor for name, tensor in packed.items()},
            "outlier_columns": reference.pack_columns(state["outlier_columns"], num_cols).unflatten(
                0, by_tile_row
            ),
            "outlier_values": state["outlier_values"].unflatten(0, by_tile_row),
        }

    def unpack(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Tensor, State]:
        spec = self.spec()
        codes_IJM, base_state = self.base.unpack(reference.base_tensors(tensors), rows, cols)
        columns_RB = tensors["outlier_columns"].flatten(0, 1)
        columns_RN = reference.unpack_columns(
            columns_RB, spec.num_outliers(cols), spec.num_cols(cols)
        )
        state = {
            "outlier_columns": columns_RN.to(torch.int32),
            "outlier_values": tensors["outlier_values"].flatten(0, 1),
        }
        return codes_IJM, state | {
            reference.PREFIX + name: tensor for name, tensor in base_state.items()
        }


def _half(values: Tensor) -> Tensor:
    """The nearest float16 numbers; those beyond its range become its largest."""
    return values.clamp(-_LARGEST, _LARGEST).half()
