"""Everything that a packed linear is: its size, its format, its transforms."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqllm_kernels import formats, transforms
from vqllm_kernels.formats import FormatSpec
from vqllm_kernels.layout import TensorLayout
from vqllm_kernels.transforms import TransformSpec

BLOCK_WEIGHTS = 1 << 25
"""Weights that are coded or decoded at a time where rows can be: 128 MB in float32, and 9 times as
much at work (uniform). In one piece an embedding of 151,936 x 4096 would take 2.5 and 22 GB."""
BLOCK_ROWS = 128
"""Rows of a block are a multiple of this, which suits the tiles of every kernel."""


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """A packed linear of `rows` x `cols`.

    `transforms` stand in the order in which they were applied to W. The stored tensors are those
    of the format under their own names and those of transform i under `t{i}_` + name.
    """

    rows: int
    cols: int
    format: FormatSpec
    transforms: tuple[TransformSpec, ...] = ()

    @property
    def inputs(self) -> tuple[TransformSpec, ...]:
        """The transforms of the input."""
        return tuple(t for t in self.transforms if t.side == "in")

    def layout(self) -> dict[str, TensorLayout]:
        """All stored tensors (the bias, which is not packed, excluded)."""
        layout = dict(self.format.layout(self.rows, self.cols))
        for i, transform in enumerate(self.transforms):
            layout |= {f"t{i}_{name}": t for name, t in transform.layout().items()}
        return layout

    def split(
        self, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """Stored tensors, sorted into those of the format and those of each transform."""
        own = {name: tensors[name] for name in self.format.layout(self.rows, self.cols)}
        others = [
            {name: tensors[f"t{i}_{name}"] for name in transform.layout()}
            for i, transform in enumerate(self.transforms)
        ]
        return own, others

    def problem(self, tensors: dict[str, Tensor]) -> str | None:
        """What is wrong with the values of tensors that are those of the layout, or None."""
        own, others = self.split(tensors)
        for transform, state in zip(self.transforms, others):
            if problem := transform.problem(state):
                return f"{transform.kind} transform: {problem}"
        return self.format.problem(own, self.rows, self.cols)

    def row_wise(self) -> bool:
        """Whether some rows can be decoded without the others: no transform mixes rows, and every
        stored tensor either has its own part for each row of tiles or is the same for all rows."""
        one = self.format.layout(self.format.tile[0], self.cols)
        every = self.format.layout(self.rows, self.cols)
        return all(t.side == "in" for t in self.transforms) and all(
            tensor.by_tile_row or tensor == one[name] for name, tensor in every.items()
        )

    def row_blocks(self) -> list[tuple[int, int]]:
        """First row and the one after the last of the blocks in which the matrix is decoded: one
        block, unless it is large and `row_wise`."""
        if self.rows * self.cols <= BLOCK_WEIGHTS or not self.row_wise():
            return [(0, self.rows)]
        unit = math.lcm(BLOCK_ROWS, self.format.tile[0])
        step = max(BLOCK_WEIGHTS // self.cols // unit, 1) * unit
        return [(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    def block(self, tensors: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        """The format's tensors of one of the `row_blocks`, without a copy; those of transforms are
        left out."""
        layout = self.format.layout(self.rows, self.cols)
        tile_rows = self.format.tile[0]
        tiles = slice(start // tile_rows, -(-stop // tile_rows))
        whole = stop - start == self.rows
        return {
            name: tensors[name][tiles] if t.by_tile_row and not whole else tensors[name]
            for name, t in layout.items()
        }

    def dequantize(self, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weights [rows, cols] in the model's own basis, computed in float32 and rounded
        once to `dtype`."""
        _, states = self.split(tensors)
        blocks = self.row_blocks()
        if len(blocks) == 1:
            own = self.block(tensors, 0, self.rows)
            return self._own_basis(self.format.decode(own, self.rows, self.cols), states).to(dtype)
        device = next(iter(tensors.values())).device
        W = torch.empty(self.rows, self.cols, dtype=dtype, device=device)
        for start, stop in blocks:
            own = self.block(tensors, start, stop)
            W[start:stop] = self._own_basis(
                self.format.decode(own, stop - start, self.cols), states
            )
        return W

    def _own_basis(self, W: Tensor, states: list[dict[str, Tensor]]) -> Tensor:
        for transform, state in reversed(list(zip(self.transforms, states))):
            W = transform.inverse(W, state)
        return W

    def to_dict(self) -> dict[str, Any]:
        """JSON values without the size, so that linears of any size can share a specification."""
        return {
            "codec": self.format.to_dict(),
            "transforms": [t.to_dict() for t in self.transforms],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], rows: int, cols: int) -> "LinearSpec":
        """The spec that `to_dict` described. ValueError for anything unknown."""
        return cls(
            rows=rows,
            cols=cols,
            format=formats.from_dict(values["codec"]),
            transforms=tuple(
                transforms.from_dict(t, cols if t["side"] == "in" else rows)
                for t in values["transforms"]
            ),
        )


Stage = tuple[TransformSpec, dict[str, Tensor]]
"""A transform and its stored tensors."""


@dataclass(frozen=True)
class BoundLinear:
    """A linear with its tensors."""

    spec: LinearSpec
    blocks: list[tuple[int, int]]
    """`spec.row_blocks()`"""
    own: dict[str, Tensor]
    """The tensors of the format."""
    stages: list[Stage]
    """In the order in which they were applied to W."""

    @classmethod
    def of(
        cls,
        spec: LinearSpec,
        tensors: dict[str, Tensor],
        blocks: list[tuple[int, int]] | None = None,
    ) -> "BoundLinear":
        """With its stored tensors; `blocks` are `spec.row_blocks()` for who has them already."""
        own, states = spec.split(tensors)
        blocks = spec.row_blocks() if blocks is None else blocks
        return cls(spec, blocks, own, list(zip(spec.transforms, states)))

    @property
    def inputs(self) -> list[Stage]:
        """In the order in which they are applied to an input."""
        return [stage for stage in self.stages if stage[0].side == "in"]

    @property
    def outputs(self) -> list[Stage]:
        """In the order in which they are applied to an output."""
        return [stage for stage in reversed(self.stages) if stage[0].side == "out"]
