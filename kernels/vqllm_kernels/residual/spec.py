"""Format residual-v1: two or more formats of the same tile, added; the bits are in `reference`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor

from vqllm_kernels import formats
from vqllm_kernels.cpu.kernels import PackedKernels
from vqllm_kernels.formats import FormatSpec, register
from vqllm_kernels.kernels import Kernels, Kind
from vqllm_kernels.layout import TensorLayout
from vqllm_kernels.residual import reference
from vqllm_kernels.residual.kernels import ResidualKernels

if TYPE_CHECKING:
    from vqllm_kernels.cpu.parts import Part


@register
@dataclass(frozen=True, kw_only=True)
class ResidualSpec(FormatSpec):
    """The tensors of stage i are those of `stages[i]` under `s{i}_` + name."""

    format_id: ClassVar[str] = "residual-v1"

    stages: tuple[FormatSpec, ...]

    def __post_init__(self) -> None:
        tiles = [stage.tile for stage in self.stages]
        if len(tiles) < 2 or len(set(tiles)) > 1:
            raise ValueError(
                f"{self.format_id}: stages with tiles {tiles}; needed are two or more stages of "
                "the same tile"
            )

    @property
    def tile(self) -> tuple[int, int]:
        return self.stages[0].tile

    def layout(self, rows: int, cols: int) -> dict[str, TensorLayout]:
        return {
            f"s{i}_{name}": tensor
            for i, stage in enumerate(self.stages)
            for name, tensor in stage.layout(rows, cols).items()
        }

    def decode(self, tensors: dict[str, Tensor], rows: int, cols: int) -> Tensor:
        return reference.decode(tensors, self.stages, rows, cols)

    def decode_rows(self, tensors: dict[str, Tensor], index_N: Tensor, cols: int) -> Tensor:
        return reference.decode_rows(tensors, self.stages, index_N, cols)

    def kernels(self, kind: Kind) -> Kernels:
        if kind == "packed":
            return self._packed()
        return ResidualKernels(self, tuple(stage.kernels(kind) for stage in self.stages))

    def _packed(self) -> Kernels:
        """The products of all stages, added before anything is rounded."""
        every = [stage.kernels("packed") for stage in self.stages]
        stages = [kernels for kernels in every if isinstance(kernels, PackedKernels)]
        if len(stages) < len(every):
            return super().kernels("packed")

        def parts(tensors: dict[str, Tensor]) -> "list[Part]":
            return [
                part
                for i, stage in enumerate(stages)
                for part in stage.parts(reference.stage_tensors(tensors, i))
            ]

        reasons = [stage.reason for stage in stages if stage.reason is not None]
        return PackedKernels(
            spec=self,
            parts=parts,
            reason=reasons[0] if reasons else None,
            wide_only=any(stage.wide_only for stage in stages),
        )

    def problem(self, tensors: dict[str, Tensor], rows: int, cols: int) -> str | None:
        for i, stage in enumerate(self.stages):
            if problem := stage.problem(reference.stage_tensors(tensors, i), rows, cols):
                return f"stage {i}: {problem}"
        return None

    def to_dict(self) -> dict[str, Any]:
        return {"format": self.format_id, "stages": [stage.to_dict() for stage in self.stages]}

    @classmethod
    def _from_fields(cls, values: dict[str, Any]) -> Self:
        if set(values) != {"stages"}:
            raise ValueError(
                f"format {cls.format_id}: fields {sorted(values)}, expected ['stages']"
            )
        return cls(stages=tuple(formats.from_dict(stage) for stage in values["stages"]))
