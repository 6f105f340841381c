"""Learned lattices: d weights of a row as a point of a lattice fitted to a group of columns.

    W = scale · F⁻¹(G q)        q in a box: of integers, or of the lattice E8 shifted by 1/4

G and the curvature mu of the companding F are learned for each group, on all rows of its columns.

With integers (GLVQ) G is both the lattice and the shape of its box, so that a better lattice has a
worse box: the smallest box of a basis of E8 around a ball has 16 times the volume of a cube, which
is 3 dB, against the 0.65 dB that E8 gains. From any start, learning on Gaussian weights ends at a
rotated cubic grid, and only companding lowers the error. With E8 the box stays a cube and the
lattice is the best in eight dimensions. G is lower triangular: a basis of any lattice can be
rotated into that form, and then coded one component after another.

A tile of several integers is no better than single ones either, and in LDLQ 1 % worse, because
there is no feedback within the tile: on rotated weights use integers with dim 1.

Mean squared error of 2^20 unit Gaussian weights, diagonal G, all columns one group; every component
by itself (dim 1) or in E8 (dim 8):

    bits                  1         2         3         4         5         2.5
    integers              0.3634    0.1189    0.0375    0.01158   0.00352
    integers, mu          0.3634    0.1175    0.0349    0.00987   0.00273
    integers, tanh        0.3634    0.1175    0.0346    0.00953   0.00251
    Lloyd-Max             0.3634    0.1175    0.0345    0.00950   0.00250
    e8                    0.3412    0.1021    0.0318    0.00989   0.00303
    e8, mu                0.3432    0.0982    0.0276    0.00768   0.00210
    e8, tanh              0.3416    0.0979    0.0268    0.00705   0.00183   0.0576

Source: GLVQ, arXiv 2510.20984 (integers, mu; no code was published); LL-VQ-VAE, arXiv 2310.09382
(diagonal G). E8 in a box, tanh and the search are ours.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from vqllm.codecs import learned_lattice_fit
from vqllm.codecs.base import CODECS, MIN_SCALE, check_finite
from vqllm.codecs.search.learned_lattice import Lattice
from vqllm.core.protocols import Codec, Point, State
from vqllm.errors import RecipeError
from vqllm_kernels.learned_lattice import reference
from vqllm_kernels.learned_lattice.spec import MAX_DIM, LearnedLatticeSpec

_MEAN_ABSOLUTE = (2 / math.pi) ** 0.5
"""Of unit Gaussians."""
_UNIFORM = "uniform steps: Max, IRE Trans. Inform. Theory 6 (1960), table II"
_LLOYD_MAX = "Lloyd-Max: Max, IRE Trans. Inform. Theory 6 (1960), table I"
_CUBE = "E8 in a cube: LLVQ, arXiv 2603.11021, table 3"


def _point(bits: int, dim: int, companding: str, mse: float, source: str = "measured") -> Point:
    return Point(
        label=f"learned lattice, d = {dim}, {companding}",
        options={
            "bits": bits,
            "dim": dim,
            "companding": companding,
            "generator": "diagonal",
            "group": None,
        },
        mse=mse,
        source=source,
        quick=False,
    )


@CODECS.register("learned_lattice")
class LearnedLattice(Codec):
    """A companded lattice for each group of columns."""

    points: ClassVar[tuple[Point, ...]] = (
        _point(2, 1, "none", 0.1188, _UNIFORM),
        _point(3, 1, "none", 0.03744, _UNIFORM),
        _point(4, 1, "none", 0.01154, _UNIFORM),
        _point(2, 1, "tanh", 0.1175, _LLOYD_MAX),
        _point(3, 1, "tanh", 0.0345, _LLOYD_MAX),
        _point(4, 1, "tanh", 0.0095, _LLOYD_MAX),
        _point(2, 8, "none", 0.1018, _CUBE),
        _point(3, 8, "none", 0.0318),
        _point(4, 8, "none", 0.0099),
        _point(2, 8, "tanh", 0.0979),
        _point(3, 8, "tanh", 0.0268),
        _point(4, 8, "tanh", 0.00705),
        *(
            Point(
                label=f"GLVQ: integers, d = {dim}, mu, G of {dim} x {dim} for 128 columns",
                options={"dim": dim, "lattice": "integers", "companding": "mu"},
                mse=mse,
                source="measured",
                num_weights=1 << 18,
                quick=False,
            )
            for dim, mse in ((8, 0.1162), (32, 0.1105))
        ),
    )

    # `bits` in a recipe; as an attribute that name is the method that counts the stored bits.
    model_config = ConfigDict(serialize_by_alias=True)

    type: Literal["learned_lattice"] = "learned_lattice"
    dim: int = Field(8, ge=1, le=MAX_DIM, description="d, the weights of a tile (1, d)")
    code_bits: float = Field(
        2,
        alias="bits",
        ge=1,
        le=8,
        description="bits a weight; bits times dim is an integer, and where bits is none the first "
        "components of a tile get one bit more than the others",
    )
    lattice: Literal["integers", "e8"] | None = Field(
        None, description="null is e8 where dim is a multiple of 8, integers otherwise"
    )
    companding: Literal["none", "mu", "tanh"] = Field(
        "tanh",
        description="F: none; mu, the logarithm of telephony, for heavy tails; tanh, which makes "
        "the best scalar quantizer of a Gaussian of equal steps",
    )
    generator: Literal["triangular", "diagonal"] = Field(
        "triangular",
        description="G: triangular makes use of correlations within a tile; diagonal is smaller "
        "and faster, and as good where a rotation has removed them",
    )
    group: int | None = Field(
        128, ge=1, description="columns that share G and mu, a multiple of dim; null is all"
    )
    iterations: int = Field(40, ge=0, le=10000, description="steps of Adam, each with new codes")
    regularization: float = Field(
        256.0, ge=0, description="how many vectors of the sample the start of G counts for"
    )
    sample: int | None = Field(
        None,
        ge=1,
        description="weights of a group it is fitted on, at most, drawn at random; null is 2^15, "
        "or 2^17 if all columns are one group",
    )

    @model_validator(mode="after")
    def _options_fit(self) -> "LearnedLattice":
        total = self.code_bits * self.dim
        if total != round(total):
            raise RecipeError(
                f"codec learned_lattice: {self.code_bits} bits for each of {self.dim} components "
                f"are {total} bits for a tile; allowed are multiples of 1/{self.dim} bit"
            )
        if self.lattice == "e8" and self.dim % 8:
            raise RecipeError(
                f"codec learned_lattice: e8 with dim {self.dim}; allowed are multiples of 8, or "
                "lattice integers"
            )
        if self.group is not None and self.group % self.dim:
            raise RecipeError(
                f"codec learned_lattice: group {self.group} with dim {self.dim}; a group is a "
                "multiple of dim, or null"
            )
        return self

    @property
    def weighted(self) -> bool:  # type: ignore[override]
        # In a box of integers components are coded one by one, whatever they weigh.
        return self._base == "e8"

    @property
    def exact(self) -> bool:  # type: ignore[override]
        # Where F is strongly curved, the nearest level of the parity that E8 needs may be neither
        # of the two next to the target.
        straight = self.companding == "none" or self._base == "integers"
        return straight and (self.generator == "diagonal" or self.dim == 1)

    @property
    def _base(self) -> str:
        return self.lattice or ("integers" if self.dim % 8 else "e8")

    @property
    def _widths(self) -> tuple[int, ...]:
        low, more = divmod(round(self.code_bits * self.dim), self.dim)
        return (low + 1,) * more + (low,) * (self.dim - more)

    @property
    def tile(self) -> tuple[int, int]:
        return (1, self.dim)

    @property
    def num_symbols(self) -> int:
        return self.dim

    def spec(self) -> LearnedLatticeSpec:
        return LearnedLatticeSpec(
            widths=self._widths,
            group=self.group,
            lattice=self._base,
            companding=self.companding,
            generator=self.generator,
        )

    def fit(self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator) -> State:
        """`generator` float16, `scale` float32 [P] and, if companded, `mu` float32 [P]."""
        check_finite(X_IJE, self)
        x_EPN, weight_EPN = self._sample(X_IJE, weight_IJE, generator)
        scale_P = _scale(x_EPN, weight_EPN)
        x_EPN = x_EPN / scale_P[:, None]
        eye_PEE = torch.eye(self.dim, device=x_EPN.device).repeat(len(scale_P), 1, 1)
        shape = self._lattices(eye_PEE, torch.ones_like(scale_P))
        start = learned_lattice_fit.start(x_EPN, weight_EPN, shape)
        best = learned_lattice_fit.train(
            x_EPN, weight_EPN, start, self.iterations, self.regularization
        )
        entries = reference.stored_entries(best.G_PEE, self.generator)
        state = {"generator": entries.half(), "scale": scale_P}
        return state if self.companding == "none" else {**state, "mu": best.mu_P}

    def _lattices(self, G_PEE: Tensor, mu_P: Tensor) -> Lattice:
        return Lattice(
            G_PEE, mu_P, self._base, self.companding, self._widths, self.generator == "diagonal"
        )

    def _sample(
        self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Vectors of each group and their weights, both [E, P, N].

        Where a group has fewer than the others, it is filled up with vectors of weight 0.
        """
        # P groups of N vectors each, drawn without repetition.
        num_rows, num_cols, _ = X_IJE.shape
        width = num_cols if self.group is None else self.group // self.dim
        sample = self.sample or (1 << (17 if self.group is None else 15))
        num = min(max(sample // self.dim, 1), num_rows * min(width, num_cols))
        vectors, weights = [], []
        for first in range(0, num_cols, width):
            own_width = min(width, num_cols - first)
            drawn = torch.randperm(num_rows * own_width, generator=generator)[:num].sort().values
            drawn = drawn.to(X_IJE.device)
            row_N, col_N = drawn // own_width, first + drawn % own_width
            x_NE = X_IJE[row_N, col_N].float()
            if weight_IJE is None:
                weight_NE = torch.ones_like(x_NE)
            else:
                weight_NE = weight_IJE.expand(X_IJE.shape)[row_N, col_N].float()
            # The last group may have fewer columns, so fewer vectors.
            missing = (0, 0, 0, num - len(drawn))
            vectors.append(torch.nn.functional.pad(x_NE, missing))
            weights.append(torch.nn.functional.pad(weight_NE, missing))
        x_EPN, weight_EPN = (
            torch.stack(t).permute(2, 0, 1).contiguous() for t in (vectors, weights)
        )
        return x_EPN, weight_EPN / weight_EPN.mean().clamp_min(torch.finfo(torch.float32).tiny)

    def encode(
        self, X_IJE: Tensor, state: State, col: int = 0, weight_E: Tensor | None = None
    ) -> Tensor:
        check_finite(X_IJE, self)
        if weight_E is not None and weight_E.dim() == 1:
            weight_E = weight_E[:, None, None]
        G_PEE = reference.generator_matrices(state["generator"].float(), self.dim)
        mu_P = state["scale"] if self.companding == "none" else state["mu"]
        # The columns from `col` on, group by group: each has its own lattice and scale.
        group_J = self.spec().groups(col, X_IJE.shape[1], torch.device("cpu"))
        groups, counts = torch.unique_consecutive(group_J, return_counts=True)
        codes = []
        for group, own_IJE in zip(groups.tolist(), X_IJE.split(counts.tolist(), dim=1)):
            own = slice(group, group + 1)
            lattice = self._lattices(G_PEE[own], mu_P[own].float())
            x_EN = (own_IJE.flatten(0, 1).float() / state["scale"][group].float()).T.contiguous()
            z_EN = lattice.nearest(x_EN[:, None], weight_E)[:, 0]
            codes.append(z_EN.T.unflatten(0, own_IJE.shape[:2]))
        return torch.cat(codes, 1)

    def decode(self, codes_IJM: Tensor, state: State, col: int = 0) -> Tensor:
        return self.spec().reproduce(codes_IJM, state, col)

    def pack(self, codes_IJM: Tensor, state: State) -> dict[str, Tensor]:
        return {"codes": reference.pack_symbols(codes_IJM, self._widths), **state}

    def unpack(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Tensor, State]:
        _, num_tile_cols = self.spec().grid(rows, cols)
        codes_IJM = reference.unpack_symbols(tensors["codes"], self._widths, num_tile_cols)
        return codes_IJM, {name: t for name, t in tensors.items() if name != "codes"}


def _scale(x_EPN: Tensor, weight_EPN: Tensor) -> Tensor:
    """The standard deviation of Gaussians of the same (weighted) mean absolute value, [P]. Outliers
    change it less than the root mean square."""
    total_P = (weight_EPN.double() * x_EPN.abs()).sum((0, 2))
    mean_P = total_P / weight_EPN.double().sum((0, 2)).clamp_min(torch.finfo(torch.float64).tiny)
    return (mean_P / _MEAN_ABSOLUTE).clamp_min(MIN_SCALE).float()
