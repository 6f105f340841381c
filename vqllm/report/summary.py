"""Sizes and quality of a finished run, in the one form that tables, pages and JSON share."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vqllm.core.coverage import HALF, ParameterCounts, kinds_of
from vqllm.core.protocols import JSON

NUM_WORST = 5

CODES, LINEARS, FILE = LABELS = (
    "codes only",
    "all of a quantized linear",
    "whole checkpoint, embeddings included",
)
"""Labels of the three bits per weight."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did, for the closing table and the pages beside the checkpoint."""

    model: str
    hub_id: str | None
    """the model's repository on the hub, where that is known"""
    recipe: str
    command: str
    output: Path
    bytes_before: int
    bytes_after: int
    """bytes of the weight files, embeddings included"""
    bits_per_weight: dict[str, float]
    """the three figures by label"""
    parameters: ParameterCounts | None = None
    """how many there are, and how many are quantized"""
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    evaluation: JSON | None = None
    not_quantized: dict[str, str] = field(default_factory=dict)
    """reasons by module"""
    tuning: list[JSON] = field(default_factory=list)
    """the record of each stage of a tuning"""

    def rows(self) -> list[tuple[str, str]]:
        """The closing table: label and value."""
        return [
            *self.lasting_rows(),
            ("seconds", ", ".join(f"{name} {value:.0f}" for name, value in self.seconds.items())),
            ("peak memory", _mb(self.peak_memory_bytes)),
        ]

    def lasting_rows(self) -> list[tuple[str, str]]:
        """The rows that are the same whenever and wherever the run is repeated."""
        rows = [
            ("model", self.model),
            ("recipe", self.recipe),
            ("size", f"{_mb(self.bytes_before)} → {_mb(self.bytes_after)}"),
        ]
        rows += [
            (f"bits per weight, {label}", f"{value:.3f}")
            for label, value in self.bits_per_weight.items()
        ]
        rows += coverage_rows(self.parameters, self.not_quantized)
        for stage in self.tuning:
            # A stage tunes each linear by itself, or layers, or the whole model.
            name = stage["stage"]
            if "linears" in stage:
                before, after = (_mean(stage["linears"], key) for key in ("before", "after"))
                rows.append((f"{name}, mean proxy loss", f"{before:.4g} → {after:.4g}"))
                continue
            if "layers" in stage:
                before, after = (_mean(stage["layers"], key) for key in ("before", "after"))
                shown = f"mean error of a layer's output {before:.4g} → {after:.4g}"
                rows.append((f"{name}, held-out sequences", shown))
                continue
            # The result is the state of the least held-out KL, not that of the last step.
            first, best = stage["history"][0], stage["best_step"]
            least = min(look["held_out_kl"] for look in stage["history"])
            shown = f"KL {first['held_out_kl']:.4f} → {least:.4f} after {best} steps"
            rows.append((f"{name}, held-out sequences", shown))
        rows += evaluation_rows(self.evaluation) if self.evaluation else []
        return rows

    def load_line(self) -> str:
        return f'import vqllm; AutoModelForCausalLM.from_pretrained("{self.output}")'

    def to_dict(self) -> JSON:
        values = asdict(self)
        values["output"] = self.output.name
        return values


def coverage_rows(
    parameters: ParameterCounts | None, not_quantized: Mapping[str, str]
) -> list[tuple[str, str]]:
    """How much of a model is quantized and why the rest is not, as label and value.

    Args:
        not_quantized: reasons by module.
    """
    rows = []
    if parameters is not None:
        shown = (
            f"{100 * parameters.of_layers:.2f} % of the parameters in the decoder layers, "
            f"{100 * parameters.of_model:.2f} % of all"
        )
        rows.append(("quantized", shown))
    if not_quantized:
        rows.append(("modules not quantized", kinds_of(not_quantized)))
    if parameters is not None and parameters.of_layers < HALF:
        rows.append(
            (
                "warning",
                "less than half of the decoder layers is quantized: bits of a quantized linear are "
                "those of the smaller part. report.md names the rest, with reasons",
            )
        )
    return rows


def evaluation_rows(measured: JSON) -> list[tuple[str, str]]:
    """Perplexity, and KL and agreement if there was a baseline, as label and value."""
    label, perplexity = f"perplexity on {measured['text']}", measured["perplexity"]
    if "baseline_perplexity" not in measured:
        return [(label, f"{perplexity:.3f}")]
    before = measured["baseline_perplexity"]
    return [
        (label, f"{before:.3f} → {perplexity:.3f} (ratio {perplexity / before:.3f})"),
        ("KL divergence, nats per token", f"{measured['kl']:.4f}"),
        ("top-1 agreement", f"{100 * measured['top1']:.1f} %"),
    ]


def result_rows(results: JSON) -> list[tuple[str, str]]:
    """What `evaluate` returned, as label and value."""
    rows = [("model", results["model"])]
    if "text" in results:
        rows += evaluation_rows(results["text"])
    for task, metrics in results.get("tasks", {}).items():
        for metric, value in metrics.items():
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            rows.append((f"{task} {metric}", shown))
    return rows


def worst(records: Sequence[JSON], num: int = NUM_WORST) -> list[JSON]:
    """The linears of the largest proxy loss."""
    return sorted(records, key=lambda record: -record["proxy_loss"])[:num]


def _mean(records: Sequence[JSON], key: str) -> float:
    return sum(record[key] for record in records) / len(records)


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
