"""Each tile becomes the code nearest to it; H plays no part."""

from typing import Literal

from torch import Tensor

from vqllm.core.protocols import Codec, Rounding, State
from vqllm.core.tiles import to_tiles
from vqllm.rounding.base import ROUNDINGS


@ROUNDINGS.register("nearest")
class Nearest(Rounding):
    """Round to nearest."""

    rows_apart = True
    type: Literal["nearest"] = "nearest"

    def __call__(
        self, W_RC: Tensor, H_CC: Tensor, codec: Codec, state: State
    ) -> tuple[Tensor, State]:
        return codec.encode(to_tiles(W_RC, codec.tile), state), state
