"""Eight weights on the lattice E8 with a fixed codebook: E8P (2 bits) and the 1-bit codebook.

No table is learned or stored; one scale a matrix. Made for weights that a random rotation has made
Gaussian. The points are defined in `vqllm_kernels.e8p.reference`.

Source: QuIP#, arXiv 2402.04396, section 4.
"""

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vqllm.codecs.base import (
    CODECS,
    ScaledCodec,
    SearchableCodec,
    check_finite,
    nearest_entry,
    weigh,
)
from vqllm.codecs.search import e8p as e8p_nearest
from vqllm.core.protocols import Point, State
from vqllm_kernels.e8p import reference
from vqllm_kernels.e8p.spec import E8PSpec, E81BSpec


class LatticeCodec(ScaledCodec, SearchableCodec):
    """A fixed codebook of consecutive weights of a row, eight or as `tile` says; one scale."""

    weighted: ClassVar[bool] = True

    @property
    def tile(self) -> tuple[int, int]:
        return (1, 8)

    def encode(
        self, X_IJE: Tensor, state: State, col: int = 0, weight_E: Tensor | None = None
    ) -> Tensor:
        check_finite(X_IJE, self)
        x_NE = X_IJE.flatten(0, 1) / state["scale"]
        codes_N = self._nearest(x_NE, weight_E)
        return codes_N.to(torch.int32).unflatten(0, X_IJE.shape[:2])[..., None]

    def candidates(
        self, X_IJE: Tensor, state: State, num: int, weight_E: Tensor | None = None
    ) -> Tensor:
        # Not weighted: in LDLQ with two stages, weighing the coarse stage only was up to 6 % worse
        # than weighing nothing but the complete sums.
        check_finite(X_IJE, self)
        codes_NK = self._candidates(X_IJE.flatten(0, 1) / state["scale"], num)
        return codes_NK.to(torch.int32).unflatten(0, X_IJE.shape[:2])

    def decode(self, codes_IJM: Tensor, state: State, col: int = 0) -> Tensor:
        return self._words(codes_IJM[..., 0]) * state["scale"]

    @abstractmethod
    def _nearest(self, x_NE: Tensor, weight_E: Tensor | None) -> Tensor:
        """Code of the codeword nearest to x, [N]."""

    @abstractmethod
    def _candidates(self, x_NE: Tensor, num: int) -> Tensor:
        """Codes of `num` codewords near x, [N, num], the nearest first."""

    @abstractmethod
    def _words(self, codes: Tensor) -> Tensor:
        """Codewords [..., 8] of codes [...]."""


@CODECS.register("e8p")
class E8P(LatticeCodec):
    """Two bits a weight: 65536 points of the lattice E8 in a ball."""

    # Distortion of 2^23 Gaussian weights: 0.09137 at 1/1.035, 0.09139 at 1/1.03 and 1/1.045.
    gaussian_scale: ClassVar[float] = 1 / 1.037

    points: ClassVar[tuple[Point, ...]] = (
        Point(
            label="E8P", options={}, mse=0.0913, source="QuIP#, arXiv 2402.04396, by brute force"
        ),
    )

    type: Literal["e8p"] = "e8p"

    def spec(self) -> E8PSpec:
        return E8PSpec()

    def pack(self, codes_IJM: Tensor, state: State) -> dict[str, Tensor]:
        return {"codes": codes_IJM[..., 0].to(torch.int16), **state}

    def unpack(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Tensor, State]:
        codes_IJM = (tensors["codes"].to(torch.int32) & 0xFFFF)[..., None]
        return codes_IJM, {"scale": tensors["scale"]}

    def _nearest(self, x_NE: Tensor, weight_E: Tensor | None) -> Tensor:
        if weight_E is None:
            return e8p_nearest.nearest(x_NE)
        weight_EE = torch.diag(weight_E) if weight_E.dim() == 1 else weight_E
        return e8p_nearest.weighted_nearest(x_NE, weight_EE)

    def _candidates(self, x_NE: Tensor, num: int) -> Tensor:
        return e8p_nearest.candidates(x_NE, num)

    def _words(self, codes: Tensor) -> Tensor:
        return reference.codewords(codes)


@CODECS.register("e81b")
class E81B(LatticeCodec):
    """One bit a weight: the 256 points of the lattice E8 nearest to the origin."""

    # Distortion of 2^19 Gaussian weights: 0.3194 at 1.6 and at 1.7.
    gaussian_scale: ClassVar[float] = 1.65

    points: ClassVar[tuple[Point, ...]] = (
        Point(label="E8, 256 points", options={}, mse=0.3194, source="by brute force"),
    )

    type: Literal["e81b"] = "e81b"

    def spec(self) -> E81BSpec:
        return E81BSpec()

    def pack(self, codes_IJM: Tensor, state: State) -> dict[str, Tensor]:
        return {"codes": codes_IJM[..., 0].to(torch.uint8), **state}

    def unpack(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Tensor, State]:
        return tensors["codes"].to(torch.int32)[..., None], {"scale": tensors["scale"]}

    def _nearest(self, x_NE: Tensor, weight_E: Tensor | None) -> Tensor:
        table_KE = reference.e81b_codeword_table(x_NE.device)
        if weight_E is not None:
            x_NE, table_KE = weigh(x_NE, weight_E), weigh(table_KE, weight_E)
        return nearest_entry(x_NE, table_KE)[:, 0]

    def _candidates(self, x_NE: Tensor, num: int) -> Tensor:
        return nearest_entry(x_NE, reference.e81b_codeword_table(x_NE.device), min(num, 256))

    def _words(self, codes: Tensor) -> Tensor:
        return reference.e81b_codewords(codes)
