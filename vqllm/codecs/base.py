"""What codecs share: the registry, the check of their input, and the search for near codes."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from vqllm.errors import NumericalError
from vqllm.registry import Registry
from vqllm.types import Codec, State

CODECS: Registry[Codec] = Registry("codec")


class SearchableCodec(Codec, ABC):
    """A codec that codes a tile in one symbol, the same way wherever the tile stands.

    Searches over sums of codecs may therefore regroup tiles, and keep several codes for each.
    """

    @abstractmethod
    def candidates(
        self, X_IJE: Tensor, state: State, num: int, weight_E: Tensor | None = None
    ) -> Tensor:
        """Up to `num` codes near each tile, int32 [I, J, K], K <= num, the nearest first.

        Where there are fewer, a code may occur more than once.
        """


def check_finite(X_IJE: Tensor, codec: Codec) -> None:
    """Raise NumericalError if there is a NaN or an infinity in what `codec` is given."""
    if not torch.isfinite(X_IJE).all():
        bad = int((~torch.isfinite(X_IJE)).sum())
        raise NumericalError(
            f"codec {codec.type}: {bad} of {X_IJE.numel()} weights are NaN or infinite; only finite "
            "weights can be coded. Check the source checkpoint, or raise the damping if the "
            "rounding rule diverged."
        )


def nearest_entry(
    x_NE: Tensor, table_KE: Tensor, num: int = 1, max_elements: int = 1 << 21
) -> Tensor:
    """The `num` nearest entries of a table to each vector, int64 [N, num], nearest first.

    Args:
        x_NE: float32 vectors.
        table_KE: float32 entries, K >= num.
        max_elements: distances held at a time (8 MB, about a second-level cache and a half).
    """
    center_E = table_KE.mean(0)
    table_KE = table_KE - center_E
    norms_K = (table_KE * table_KE).sum(1)
    indices = []
    for chunk in (x_NE - center_E).split(max(1, max_elements // len(table_KE))):
        cost_NK = torch.addmm(norms_K, chunk, table_KE.T, alpha=-2)
        if num == 1:
            indices.append(cost_NK.argmin(1, keepdim=True))
        else:
            indices.append(cost_NK.topk(num, largest=False).indices)
    return torch.cat(indices)
