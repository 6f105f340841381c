"""The protocols that the parts of a recipe implement, and the records that pass between them.

Shape suffixes, here and in every codec, transform and rounding rule:

    R, C   rows and columns of a weight matrix W (out_features, in_features)
    I, J   rows and columns of the grid of tiles; a tile is (tile_rows, tile_cols) of W
    E      elements of a tile, tile_rows · tile_cols, row-major inside the tile
    M      integer symbols that code one tile
    N      tokens
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from torch import Tensor

from vqllm.core.bits import BitCount, count
from vqllm_kernels.formats import FormatSpec
from vqllm_kernels.transforms import TransformSpec

State = dict[str, Tensor]
"""What `fit` learned: named tensors, never changed in place."""

JSON = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One configuration of a codec, and what it must reach on unit Gaussian weights."""

    label: str
    options: JSON
    """of the recipe, without `type`"""
    mse: float
    """published, or derived by other means; never more than 2 % worse is accepted"""
    source: str
    num_weights: int = 1 << 20
    """how many weights the codec is measured on; fewer for a slow encoder"""
    quick: bool = True
    """whether it is fast enough for the tests that every codec passes at many small shapes"""


class Settings(BaseModel):
    """A frozen group of settings. An unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool(cls, value: object, field: ValidationInfo) -> object:
        """pydantic takes true and false as the numbers 1 and 0, and the other way round."""
        is_wanted = cls.model_fields[str(field.field_name)].annotation is bool
        if is_wanted and not isinstance(value, bool):
            raise ValueError(f"{value!r} is neither true nor false")
        if isinstance(value, bool) and not is_wanted:
            raise ValueError(f"{str(value).lower()} is neither a number nor a text")
        return value


class Part(Settings):
    """A piece of a recipe that is chosen by its type."""

    type: Any
    """The name in recipes: each class narrows it to `Literal[name]`, which no type but Any lets a
    subclass do."""


class Codec(Part, ABC):
    """How a tile of weights becomes integer symbols, and back. Knows nothing of H, layers or files.

    The grid of tiles is explicit (X_IJE, codes_IJM), because scales and codebooks may depend on
    the place of a tile: `col` is the grid column of the first tile that is passed, so that a
    rounding rule can code a stripe of columns at a time.
    """

    weighted: ClassVar[bool] = False
    """Whether `encode` makes use of `weight_E`."""
    alike: ClassVar[bool] = False
    """Whether the code of a tile depends on its weights and the state alone: not on its place, and
    not on `weight_E`. Rules may then code tiles of different columns together."""
    exact: ClassVar[bool] = True
    """Whether `encode` finds the nearest reproduction, or only one close to it."""
    points: ClassVar[tuple[Point, ...]]
    """Configurations that `vqllm codecs --bench` measures and that the tests hold to their figures.
    The battery of tests that every codec must pass takes its configurations from here too."""

    @property
    @abstractmethod
    def tile(self) -> tuple[int, int]:
        """(rows, cols) of W that are coded together."""

    @property
    def num_symbols(self) -> int:
        """Integers that code one tile, M."""
        return 1

    @abstractmethod
    def spec(self) -> FormatSpec:
        """The packed format: joins this codec, its stored tensors and its kernels."""

    @property
    def format_id(self) -> str:
        return self.spec().format_id

    @abstractmethod
    def fit(self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator) -> State:
        """Learn codebooks and scales.

        Args:
            X_IJE: weights, float32.
            weight_IJE: importance of each element (broadcastable to X_IJE), or None for equal.
            generator: the only source of randomness.
        """

    @abstractmethod
    def encode(
        self, X_IJE: Tensor, state: State, col: int = 0, weight_E: Tensor | None = None
    ) -> Tensor:
        """The codes of the nearest reproduction of each tile: int32 [I, J, M], deterministic.

        "Nearest" is in the Euclidean norm. Where `weighted` says that the codec can, it is with
        squared errors weighted by `weight_E` [E], or in the norm of the positive definite matrix
        `weight_E` [E, E]: the least (x − x̂) weight (x − x̂)ᵀ.
        """

    @abstractmethod
    def decode(self, codes_IJM: Tensor, state: State, col: int = 0) -> Tensor:
        """The reproduction of the codes, float32 [I, J, E]: the definition of the code."""

    @abstractmethod
    def pack(self, codes_IJM: Tensor, state: State) -> dict[str, Tensor]:
        """The stored tensors, exactly those of `spec().layout`. Lossless."""

    @abstractmethod
    def unpack(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Tensor, State]:
        """Inverse of `pack` for a linear of `rows` x `cols` (before padding to whole tiles)."""

    def bits(self, rows: int, cols: int) -> BitCount:
        """Exact bits of the stored tensors."""
        return count(self.spec().layout(rows, cols))

    def streams(self, codes_IJM: Tensor) -> list[Tensor]:
        """The codes in parts [I, J, M] with symbols of one kind each, as the input of a lossless
        coder; without padding."""
        return [codes_IJM]

    @property
    def lists_codes(self) -> bool:
        """Whether `shortlist` finds several codes for a tile, which a search over rows needs.

        Such a codec codes a tile the same way wherever it stands, so that a search may put tiles in
        any place of the grid.
        """
        return False

    def shortlist(
        self, X_IJE: Tensor, state: State, num: int, weight_E: Tensor | None = None
    ) -> Tensor:
        """Codes of good reproductions of each tile, int32 [I, J, K, M].

        The first is that of `encode` or about as good. K is at most `num`; a code may occur more
        than once.
        """
        raise NotImplementedError(f"codec {self.type} finds one code for a tile")

    def project(self, state: State) -> State:
        """The nearest state that can be stored.

        Tuning changes the floating tensors of a state, in any floating dtype. Here they get the
        dtype of the stored tensors and values that `pack` stores without loss. A state that can be
        stored is returned as it is. A codec whose state differs from its stored tensors overrides
        this.
        """
        layout = self.spec().layout(*self.tile)
        return {
            name: _to_dtype(tensor, layout[name].dtype) if name in layout else tensor
            for name, tensor in state.items()
        }

    @property
    def row_state(self) -> frozenset[str]:
        """Names of the state's tensors whose first axis runs over the rows of tiles: what they hold
        changes the reproduction of these rows only."""
        layout = self.spec().layout(*self.tile)
        return frozenset(name for name, tensor in layout.items() if tensor.by_tile_row)

    @property
    def refit_cols(self) -> int | None:
        """Size of a group of columns of W whose part of the state a rule fits anew.

        A rule that compensates errors calls `refit` before it codes the first column of a group,
        with the targets of the group at that moment. None: the state of `fit` serves all columns.
        """
        return None

    def refit(self, X_IJE: Tensor, weight_IJE: Tensor | None, state: State, col: int) -> State:
        """The state with the part of one group of `refit_cols` columns fitted to `X_IJE`.

        Args:
            X_IJE: targets of all tiles of the group, which compensate for the errors of the columns
                coded so far.
            weight_IJE: as for `fit`.
            col: grid column of the group's first tile, a multiple of refit_cols / tile_cols.
        """
        raise NotImplementedError(f"codec {self.type} has no groups of columns to fit anew")


class OutlierCodec(Codec, ABC):
    """A codec that stores the same number of weights of every row apart, and codes the rest.

    W is the sum of the sparse outliers and of the reproduction of `base`. So codes for W are codes
    of `base` for W without the outliers, whatever the rule. A rule that chooses outliers as well
    reads them with `outliers` and sets them with `with_outliers`.
    """

    base: Codec

    @abstractmethod
    def num_outliers(self, num_tile_cols: int) -> int:
        """How many weights of a row are stored apart in a grid of so many tile columns."""

    @abstractmethod
    def outliers(self, state: State, num_tile_cols: int) -> Tensor:
        """The weights that are stored apart, zero elsewhere: float32 [I, J, E]."""

    @abstractmethod
    def base_state(self, state: State) -> State:
        """The state of `base`."""

    @abstractmethod
    def with_outliers(self, S_IJE: Tensor, base_state: State) -> State:
        """The state with the largest weights of each row of S stored apart, and that of `base`."""


def _to_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest values of a stored dtype; a value beyond its range becomes the largest in it."""
    if tensor.dtype == dtype or not tensor.is_floating_point():
        return tensor
    limit = torch.finfo(dtype).max
    return tensor.detach().clamp(-limit, limit).to(dtype)


class Transform(Part, ABC):
    """An invertible change of one side of W (and of H), undone on the activations at run time.

    side "in" acts on the columns of W and on x, and is shared by the linears of an input group;
    side "out" acts on the rows of W and on y.
    """

    side: Literal["in", "out"]

    @abstractmethod
    def spec(self, size: int) -> TransformSpec:
        """What run time needs to know, for a side of `size` features."""

    @abstractmethod
    def forward(
        self, W_RC: Tensor, H_CC: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, State]:
        """Transformed W and H, and the state that undoes it. H changes only on side "in"."""

    def divided(self, part: int) -> Self:
        """This transform where each part of the side, of `part` features, belongs to another
        process: one that mixes features and can do so within parts does. By default itself."""
        return self

    def _size(self, W_RC: Tensor) -> int:
        return W_RC.shape[1] if self.side == "in" else W_RC.shape[0]

    def inverse(self, W_RC: Tensor, state: State) -> Tensor:
        """The weights in the basis before `forward`."""
        return self.spec(self._size(W_RC)).inverse(W_RC, state)

    def wrap_input(self, x_NC: Tensor, state: State) -> Tensor:
        """What inference does to x before the product with the transformed weights."""
        return self.spec(x_NC.shape[-1]).input(x_NC, state) if self.side == "in" else x_NC

    def wrap_output(self, y_NR: Tensor, state: State) -> Tensor:
        """What inference does to y after the product with the transformed weights."""
        return self.spec(y_NR.shape[-1]).output(y_NR, state) if self.side == "out" else y_NR


class Rounding(Part, ABC):
    """The rule that chooses codes, given H."""

    rows_apart: ClassVar[bool] = False
    """Whether it codes each row of tiles by itself, with a codec whose state it does not change, so
    that several processes may code some of the rows each."""

    @abstractmethod
    def __call__(
        self, W_RC: Tensor, H_CC: Tensor, codec: Codec, state: State
    ) -> tuple[Tensor, State]:
        """Codes [I, J, M] and the codec's state.

        Args:
            W_RC: transformed weights, float32, any size (padded to whole tiles inside).
            H_CC: damped, positive definite E[x xᵀ] in the same basis, float32.
        """

    def refine(
        self, W_RC: Tensor, H_CC: Tensor, codec: Codec, codes_IJM: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """Codes and state, after `state` was tuned with the codes that this rule chose before.

        By default codes are chosen from the beginning; a rule that can improve given ones does so.
        """
        return self(W_RC, H_CC, codec, state)

    @property
    def tunes_state(self) -> bool:
        """Whether the state that is returned depends on all rows of W, so that blocks of rows that
        share some of it must be coded together."""
        return False

    def check(self, codec: Codec) -> None:
        """Raise RecipeError if this rule cannot serve `codec`; called when a recipe is read."""


class OutputRounding(Rounding):
    """A rule that also needs how much errors in each output raise the model's loss."""

    @abstractmethod
    def with_outputs(self, output_RR: Tensor) -> Rounding:
        """This rule for a linear whose outputs have H_O = E[g gᵀ], [R, R] float32, positive
        semidefinite, in the basis of the transformed weights; g are gradients of the loss."""


class Tuning(Part, ABC):
    """A step after rounding that changes what the codec learned, the codes, or both."""

    @abstractmethod
    def __call__(
        self,
        W_RC: Tensor,
        H_CC: Tensor,
        codec: Codec,
        codes_IJM: Tensor,
        state: State,
        rounding: Rounding,
    ) -> tuple[Tensor, State]:
        """Codes [I, J, M] and state, with tr((W − Ŵ) H (W − Ŵ)ᵀ) no larger than before.

        Args:
            W_RC, H_CC: as of the rounding rule.
            codes_IJM, state: what the rounding rule, or the tuning before this one, chose.
            rounding: the rule, to choose codes again.
        """

    def check(self, codec: Codec) -> None:
        """Raise RecipeError if this step cannot serve `codec`; called when a recipe is read."""
