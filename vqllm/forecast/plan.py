"""The plan of a run: one record, which tables and JSON share."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from vqllm.core.coverage import ParameterCounts
from vqllm.core.progress import duration
from vqllm.core.protocols import JSON


@dataclass(frozen=True)
class Estimate:
    """A number that is expected, and between which two the result should lie."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run of `vqllm quantize` will give and take."""

    model: str
    recipe: str
    recipe_values: JSON
    """every key of the recipe, with those that a target chose"""
    bytes_before: int
    bytes_after: int
    """of all tensors of the checkpoint"""
    file_bytes: int
    """of its weight files: tensors and headers"""
    bits_per_weight: dict[str, float]
    """the three figures by label, as reports have them"""
    parameters: ParameterCounts
    not_quantized: dict[str, str]
    """reasons by module"""
    kl: Estimate | None = None
    """KL divergence from the original's predictions, nats a token"""
    perplexity_ratio: Estimate | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """by stage"""
    memory: dict[str, int] = field(default_factory=dict)
    """peak bytes of the process by stage"""
    disk: dict[str, int] = field(default_factory=dict)
    """bytes in the output folder, by what they hold"""
    notes: tuple[str, ...] = ()
    """what the numbers do not include, or rest on"""

    @property
    def peak_memory_bytes(self) -> int:
        """The largest of all stages; 0 where nothing was measured."""
        return max(self.memory.values(), default=0)

    def rows(self) -> list[tuple[str, str]]:
        """The table: label and value. What stays as it is comes from `not_quantized`."""
        rows = [
            ("model", self.model),
            ("recipe", self.recipe),
            ("size", f"{_mb(self.bytes_before)} → {_mb(self.bytes_after)}"),
            ("weight files", f"{_mb(self.file_bytes)} with their headers"),
        ]
        rows += [
            (f"bits per weight, {label}", f"{value:.3f}")
            for label, value in self.bits_per_weight.items()
        ]
        for label, estimate in (
            ("expected KL divergence, nats per token", self.kl),
            ("expected ratio of perplexities", self.perplexity_ratio),
        ):
            if estimate is not None:
                rows.append((label, _range(estimate)))
        if self.seconds:
            stages = ", ".join(f"{name} {duration(own)}" for name, own in self.seconds.items())
            rows.append(("time", f"{duration(sum(self.seconds.values()))} ({stages})"))
        if self.memory:
            rows.append(("peak memory", f"{_mb(self.peak_memory_bytes)} ({_parts(self.memory)})"))
        rows.append(("disk", f"{_mb(sum(self.disk.values()))} ({_parts(self.disk)})"))
        return rows

    def to_dict(self) -> JSON:
        """JSON values with every field present."""
        return {
            **asdict(self),
            "notes": list(self.notes),
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def _range(estimate: Estimate) -> str:
    return f"{estimate.value:.3g} ({estimate.low:.3g} to {estimate.high:.3g})"


def _parts(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_mb(own)}" for name, own in sizes.items())


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
