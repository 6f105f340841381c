"""Parts that codecs share: registry, check of their input, scales, search for near codes."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vqllm.codecs.search.compiled import has_numba
from vqllm.core import threads
from vqllm.core.protocols import Codec, State
from vqllm.core.registry import Registry
from vqllm.errors import NumericalError, RecipeError

CODECS: Registry[Codec] = Registry("codec", Codec, "vqllm.codecs")

MAX_DISTANCES = 1 << 21
"""Distances in memory at a time in a search through a table: 8 MB."""

MIN_SCALE = 1e-30
"""A matrix of zeros gets this scale, so that it decodes to zeros for every practical purpose."""


def build_part(owner: str, role: str, value: Any) -> Codec:
    """Turn `{type: name, ...}`, the options of a codec inside another one, into that codec.

    Raises:
        RecipeError: there is no `type`, or no codec of that name.
    """
    if isinstance(value, Codec):
        return value
    if not isinstance(value, dict) or "type" not in value:
        raise RecipeError(
            f"codec {owner}: {role} {value!r} has no `type`; allowed are {', '.join(CODECS)}"
        )
    return CODECS.get(str(value["type"])).model_validate(value)


class SearchableCodec(Codec, ABC):
    """A codec that codes a tile in one symbol, which does not depend on the place of the tile.

    Searches over sums of codecs may therefore regroup tiles, and try several codes for each.
    """

    weighs_candidates: ClassVar[bool] = False
    """Whether `candidates` are near in the norm of the weights."""

    @abstractmethod
    def candidates(
        self, X_IJE: Tensor, state: State, num: int, weight_E: Tensor | None = None
    ) -> Tensor:
        """Up to `num` codes near each tile, int32 [I, J, K], K <= num, the nearest first.

        Where there are fewer, a code may occur more than once. Weights are those of `encode`. A
        codec may ignore them, because the search for a sum weighs the sums itself.
        """

    @property
    def lists_codes(self) -> bool:
        return True

    def shortlist(
        self, X_IJE: Tensor, state: State, num: int, weight_E: Tensor | None = None
    ) -> Tensor:
        if num == 1:
            return self.encode(X_IJE, state, weight_E=weight_E)[:, :, None]
        codes_IJK = self.candidates(X_IJE, state, num, weight_E)
        if weight_E is not None and not self.weighs_candidates:
            nearest_IJM = self.encode(X_IJE, state, weight_E=weight_E)
            codes_IJK = torch.cat((nearest_IJM, codes_IJK[..., : num - 1]), -1)
        return codes_IJK[..., None]


class ScaledCodec(Codec, ABC):
    """A fixed code for Gaussian weights of unit variance, times one scale for the matrix."""

    gaussian_scale: ClassVar[float]
    """Scale over the standard deviation of Gaussian weights that minimises the distortion. Where it
    depends on the options, a property of the same name takes its place."""

    scale_factor: float = Field(
        1.0,
        gt=0,
        description="scale of the code; 1 is the best for rounding Gaussian weights to nearest",
    )

    def fit(self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator) -> State:
        """`scale` float32 [1], proportional to the (weighted) root mean square of the weights."""
        check_finite(X_IJE, self)
        scale = self.scale_factor * self.gaussian_scale * root_mean_square(X_IJE, weight_IJE)
        return {"scale": scale.clamp(min=MIN_SCALE).float().reshape(1)}


@threads.one_thread()
def root_mean_square(X_IJE: Tensor, weight_IJE: Tensor | None) -> Tensor:
    """The root of the (weighted) mean square of all weights, float64 scalar."""
    if weight_IJE is None:
        return torch.linalg.vector_norm(X_IJE, dtype=torch.float64) / X_IJE.numel() ** 0.5
    weight = weight_IJE.double().expand_as(X_IJE)
    squares = X_IJE.to(torch.float64, copy=True).square_()
    return (squares.mul_(weight).sum() / weight.sum()).sqrt()


def check_finite(X_IJE: Tensor, codec: Codec) -> None:
    """Raise NumericalError if the weights for `codec` have a NaN or an infinity."""
    if not torch.isfinite(X_IJE).all():
        bad = int((~torch.isfinite(X_IJE)).sum())
        raise NumericalError(
            f"codec {codec.type}: {bad} of {X_IJE.numel()} weights are NaN or infinite; only "
            "finite weights can be coded. Check the source checkpoint, or raise the damping if "
            "the rounding rule diverged."
        )


def weigh(x: Tensor, weight_E: Tensor) -> Tensor:
    """Vectors whose Euclidean norms are the weighted norms of x.

    Args:
        x: [..., E].
        weight_E: the weights [E] of squared errors, or the positive definite matrix [E, E] of the
            quadratic form e weight eᵀ.
    """
    if weight_E.dim() == 1:
        return x * weight_E.sqrt()
    return x @ torch.linalg.cholesky(weight_E)


def nearest_entry(x_NE: Tensor, table_KE: Tensor, num: int = 1) -> Tensor:
    """The `num` nearest entries of a table to each vector, int64 [N, num], nearest first.

    Args:
        x_NE: float32 vectors.
        table_KE: float32 entries, K >= num.
    """
    if num == 1 and table_KE.shape[1] == 1:
        return _nearest_scalar(x_NE[:, 0].contiguous(), table_KE[:, 0])[:, None]
    # Distances from a common centre: otherwise the rounding of |c|² − 2 x·c hides them.
    center_E = (table_KE.amin(0) + table_KE.amax(0)) / 2
    table_KE = table_KE - center_E
    if num == 1 and table_KE.shape[1] <= 8 and x_NE.device.type == "cpu" and has_numba():
        # Imported here: numba takes longer to import than all the rest.
        from vqllm.codecs.search import codebook_numba as nearest_numba

        index_N = nearest_numba.nearest(
            (x_NE - center_E).detach().contiguous().numpy(),
            table_KE.detach().contiguous().numpy(),
            torch.get_num_threads(),
        )
        return torch.from_numpy(index_N).long()[:, None]
    norms_K = (table_KE * table_KE).sum(1)
    index_NK = torch.empty(len(x_NE), num, dtype=torch.int64, device=x_NE.device)
    at_a_time = max(1, MAX_DISTANCES // len(table_KE))
    for start in range(0, len(x_NE), at_a_time):
        own = slice(start, start + at_a_time)
        cost_NK = torch.addmm(norms_K, x_NE[own] - center_E, table_KE.T, alpha=-2)
        # Into one tensor: small ones that outlive a pass would fill the gaps that the large ones
        # leave in the heap. With 65536 entries 2^16 vectors then took 17 GB.
        index_NK[own] = cost_NK.argmin(1, keepdim=True) if num == 1 else smallest(cost_NK, num)
    return index_NK


def smallest(values_NK: Tensor, num: int) -> Tensor:
    """Indices of the `num` smallest values of each row, ascending, int64 [N, num].

    torch.topk selects in one pass where a row has at least 64 · num values and takes up to three
    times as long where it has fewer; up to num = 8 it pays to fill such rows up.
    """
    missing = 64 * num - values_NK.shape[1]
    if 0 < missing <= 272:
        values_NK = torch.nn.functional.pad(values_NK, (0, missing), value=torch.inf)
    return values_NK.topk(num, largest=False).indices


def _nearest_scalar(x_N: Tensor, table_K: Tensor) -> Tensor:
    """Nearest numbers by bisection: at 256 entries 14 times faster than by all distances."""
    sorted_K, order_K = table_K.sort(stable=True)
    midpoints = (sorted_K[1:] + sorted_K[:-1]) / 2
    return order_K[torch.bucketize(x_N, midpoints)]
