"""24 weights as a point of the Leech lattice, 1 to 3 bits a weight.

The lattice packs and covers 24 dimensions best, and its shells (points of one norm) are the
codebook: no table is stored, the number of a point is computed. Each shell has a gain or several,
fixed but for one scale: made for weights that a random rotation has made Gaussian. The points and
their numbers are defined in `vqllm_kernels.leech.reference`.

Mean squared error of unit Gaussian weights, at 2 bits but for the last line:

    spherical    shells 2..13, one scale                           0.0773   published 0.0827
    shape-gain   shells 2..12 cut to one norm, each at two gains   0.0769   published 0.0770
    fitted       shells 8..12, each at 2 to 6 gains of its own     0.0735
    fitted       at 1, 1.5, 2.5, 3 bits                            0.2866  0.1489  0.0368  0.0185

The search is exact, so only the gains can be chosen. A ball of lattice points has the best cells,
but not the best density for a Gaussian. Spheres of a few radii have it, and have more points if a
radius belongs to one shell and not to all: 48 bits number the points of shells 2..13 once, or those
of 12 twice, of 11 three times, of 10 four times ... each time with another gain.

Source: LLVQ, arXiv 2603.11021 (spherical and shape-gain); the fitted gains are ours.
"""

import logging
from functools import cache
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from vqllm.codecs.base import CODECS, ScaledCodec, check_finite
from vqllm.core.protocols import Point, State
from vqllm.errors import RecipeError
from vqllm_kernels.bitpack import pack_bits, unpack_bits
from vqllm_kernels.leech import reference
from vqllm_kernels.leech.spec import LeechSpec

logger = logging.getLogger(__name__)

_SPHERICAL_SCALE = 0.98
"""Distortion of 2^20 Gaussian weights: 0.07754 at 0.96, 0.07726 at 0.98, 0.07742 at 1."""

_RADII: dict[tuple[str, float], dict[int, tuple[float, ...]]] = {
    ("fitted", 1): {3: (4.139,)},
    ("fitted", 1.5): {
        6: (4.642,),
        5: (3.193, 3.704, 4.192, 4.781, 5.364, 5.985),
        4: (3.565, 4.381, 5.576),
    },
    ("fitted", 2): {
        12: (4.421, 5.258),
        11: (3.911, 4.807, 5.769),
        10: (3.524, 4.298, 5.007, 6.02),
        9: (2.997, 3.658, 4.267, 4.853, 5.577, 6.497),
        8: (3.306, 4.042, 4.904, 6.41),
    },
    ("fitted", 2.5): {
        25: (4.748, 5.825),
        24: (4.304, 5.256),
        23: (3.937, 5.024),
        22: (4.412, 5.246),
        21: (4.616, 5.378),
        20: (3.609, 6.612),
        19: (3.379,),
        17: (2.948,),
    },
    ("fitted", 3): {
        51: (4.307, 5.266),
        50: (3.958, 5.787),
        49: (4.772, 5.517),
        48: (4.579, 5.114),
        47: (4.427, 5.001),
        46: (4.816, 6.116),
        45: (4.776, 6.63),
        44: (3.579,),
        42: (3.128,),
    },
    ("spherical", 2): {
        shell: (_SPHERICAL_SCALE * (2 * shell) ** 0.5,) for shell in reversed(range(2, 14))
    },
    ("shape-gain", 2): dict.fromkeys(reversed(range(2, 13)), (4.162, 5.24)),
}
"""Norms of the points of each shell for Gaussian weights of unit variance, by shape and bits.

Centroids, found by alternately coding 2^20 Gaussian weights and averaging (Lloyd), 20 times. The
number of norms of each shell is the best of those tried, where all points of all shells just fit
the bits."""


@CODECS.register("leech")
class Leech(ScaledCodec):
    """A point of the Leech lattice, times the gain of its shell."""

    weighted: ClassVar[bool] = True

    # Radii of `_RADII` are those of Gaussian weights already.
    gaussian_scale: ClassVar[float] = 1.0

    points: ClassVar[tuple[Point, ...]] = (
        Point(label="Leech, fitted gains", options={}, mse=0.0735, source="measured"),
        *(
            Point(
                label="Leech, fitted gains",
                options={"bits": bits},
                mse=mse,
                source="measured",
                quick=False,
            )
            for bits, mse in ((1, 0.2866), (1.5, 0.1489), (2.5, 0.0368), (3, 0.0185))
        ),
        Point(
            label="Leech, spherical",
            options={"shape": "spherical"},
            mse=0.0773,
            source="measured; LLVQ, arXiv 2603.11021, table 3: 0.0827",
            quick=False,
        ),
        Point(
            label="Leech, shape-gain",
            options={"shape": "shape-gain"},
            mse=0.0770,
            source="LLVQ, arXiv 2603.11021, table 3",
            quick=False,
        ),
    )

    # `bits` in a recipe; as an attribute that name is the method that counts the stored bits.
    model_config = ConfigDict(serialize_by_alias=True)

    type: Literal["leech"] = "leech"
    rate: float = Field(2, alias="bits", ge=1, le=3, description="bits a weight: 1, 1.5, ... 3")
    shape: Literal["fitted", "spherical", "shape-gain"] = Field(
        "fitted",
        description="fitted: every shell of the lattice has gains of its own; spherical: a ball of "
        "the lattice; shape-gain: directions of lattice points, at two gains",
    )

    @model_validator(mode="after")
    def _has_radii(self) -> "Leech":
        if (self.shape, self.rate) not in _RADII:
            allowed = ", ".join(f"{rate:g}" for shape, rate in _RADII if shape == self.shape)
            raise RecipeError(
                f"codec leech: {self.rate:g} bits with shape {self.shape}; allowed are {allowed}"
            )
        return self

    @property
    def tile(self) -> tuple[int, int]:
        return (1, reference.DIMENSIONS)

    @property
    def num_symbols(self) -> int:
        return self.spec().index_bits // reference.SYMBOL_BITS

    def _levels(self) -> list[tuple[int, float]]:
        """Shell and norm of each level."""
        radii = _RADII[self.shape, self.rate]
        return [(shell, radius) for shell, own in radii.items() for radius in own]

    def spec(self) -> LeechSpec:
        return LeechSpec(
            index_bits=round(self.rate * reference.DIMENSIONS),
            shells=tuple(shell for shell, _ in self._levels()),
        )

    def fit(self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator) -> State:
        """`gains` float32 [L], proportional to the (weighted) root mean square of the weights."""
        scale = super().fit(X_IJE, weight_IJE, generator)["scale"]
        gains = torch.tensor([radius / (4 * shell**0.5) for shell, radius in self._levels()])
        return {"gains": gains.to(scale.device) * scale}

    def encode(
        self, X_IJE: Tensor, state: State, col: int = 0, weight_E: Tensor | None = None
    ) -> Tensor:
        check_finite(X_IJE, self)
        # Imported here: numba takes longer to import than all the rest.
        from vqllm.codecs.search import leech as leech_nearest

        if X_IJE.device.type != "cpu":
            _warn_once()
        spec, gain_L = self.spec(), state["gains"].cpu().double()
        weight_EE = None
        if weight_E is not None:
            weight_EE = torch.diag(weight_E) if weight_E.dim() == 1 else weight_E
            weight_EE = weight_EE.cpu().double().contiguous().numpy()
        # The search takes gains without a sign; a negative gain g of a point X is −g of −X.
        points, levels = leech_nearest.nearest(
            X_IJE.flatten(0, 1).float().cpu().contiguous().numpy(),
            gain_L.abs().numpy(),
            spec.shells,
            torch.get_num_threads(),
            weight_EE,
        )
        X_NE, level_N = torch.from_numpy(points), torch.from_numpy(levels)
        X_NE = torch.where((gain_L < 0)[level_N, None], -X_NE, X_NE)
        codes_NM = reference.numbers(X_NE, level_N, spec.shells, spec.index_bits)
        return codes_NM.to(X_IJE.device).unflatten(0, X_IJE.shape[:2])

    def decode(self, codes_IJM: Tensor, state: State, col: int = 0) -> Tensor:
        return reference.codewords(codes_IJM, state["gains"], self.spec().shells)

    def pack(self, codes_IJM: Tensor, state: State) -> dict[str, Tensor]:
        return {"codes": pack_bits(codes_IJM.flatten(1), reference.SYMBOL_BITS), **state}

    def unpack(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Tensor, State]:
        spec = self.spec()
        num_tile_cols = spec.grid(rows, cols)[1]
        codes = unpack_bits(
            tensors["codes"], reference.SYMBOL_BITS, num_tile_cols * self.num_symbols
        )
        return codes.unflatten(1, (-1, self.num_symbols)), {"gains": tensors["gains"]}


@cache
def _warn_once() -> None:
    logger.warning(
        "the search for Leech points runs on the CPU, whatever the device of the weights"
    )
