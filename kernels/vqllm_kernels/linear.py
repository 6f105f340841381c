"""Everything that a packed linear is: its size, its format, its transforms."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vqllm_kernels import formats, transforms
from vqllm_kernels.formats import FormatSpec
from vqllm_kernels.layout import TensorLayout
from vqllm_kernels.transforms import TransformSpec


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

    def dequantize(self, tensors: dict[str, Tensor]) -> Tensor:
        """The dense weights in the model's own basis, float32 [rows, cols]."""
        own, others = self.split(tensors)
        W = self.format.decode(own, self.rows, self.cols)
        for transform, state in reversed(list(zip(self.transforms, others))):
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
