"""Four weights on the lattice D4 with a fixed codebook, 2 bits a weight.

The smaller relative of E8P: a table of 256 points that any reader builds, one scale a matrix. The
points are defined in `vqllm_kernels.d4.reference`.

Source: the first release of QuIP#, arXiv 2402.04396.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from vqllm.codecs.base import CODECS, nearest_entry, weigh
from vqllm.codecs.e8p import LatticeCodec
from vqllm.core.protocols import Point, State
from vqllm_kernels.d4 import reference
from vqllm_kernels.d4.spec import D4Spec


@CODECS.register("d4")
class D4(LatticeCodec):
    """Two bits a weight: 256 points of the shifted lattice D4 in a ball."""

    # Distortion of 2^23 Gaussian weights: 0.10265 at 1/1.20, 0.10261 at 1/1.21, 0.10263 at 1/1.22.
    gaussian_scale: ClassVar[float] = 1 / 1.21

    points: ClassVar[tuple[Point, ...]] = (
        Point(label="D4, 256 points", options={}, mse=0.1027, source="by brute force"),
    )

    type: Literal["d4"] = "d4"

    @property
    def tile(self) -> tuple[int, int]:
        return (1, 4)

    def spec(self) -> D4Spec:
        return D4Spec()

    def pack(self, codes_IJM: Tensor, state: State) -> dict[str, Tensor]:
        return {"codes": codes_IJM[..., 0].to(torch.uint8), **state}

    def unpack(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Tensor, State]:
        return tensors["codes"].to(torch.int32)[..., None], {"scale": tensors["scale"]}

    def _nearest(self, x_NE: Tensor, weight_E: Tensor | None) -> Tensor:
        table_KE = reference.codeword_table(x_NE.device)
        if weight_E is not None:
            x_NE, table_KE = weigh(x_NE, weight_E), weigh(table_KE, weight_E)
        return nearest_entry(x_NE, table_KE)[:, 0]

    def _candidates(self, x_NE: Tensor, num: int) -> Tensor:
        return nearest_entry(x_NE, reference.codeword_table(x_NE.device), min(num, 256))

    def _words(self, codes: Tensor) -> Tensor:
        return reference.codewords(codes)
