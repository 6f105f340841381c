"""What came out of a comparison: a row a member, ranked."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vqllm.core.protocols import JSON
from vqllm.report.summary import LINEARS, Summary
from vqllm.runs.compare.ranking import RULE, standings


@dataclass(frozen=True, kw_only=True)
class ComparisonResult:
    """The members of a comparison, as far as they are finished, and the original model.

    `rows` has one entry a finished member, by size and then by rank: `name`, `recipe` (every key),
    `bits_per_weight` (three figures by label), `bytes` of the file, `evaluation` (perplexity,
    baseline_perplexity, kl, top1, windows), `ratio` of the perplexities, `standing`
    (`ranking.Standing`), and `cost` (seconds by phase, whether they are the whole time, peak
    memory), which another run may have otherwise.
    """

    model: str
    text: str
    """what everybody was measured on"""
    original: JSON
    """`bytes` and `perplexity`; empty before a member is finished"""
    rows: list[JSON]
    failed: dict[str, str] = field(default_factory=dict)
    """errors by member"""
    repeated: dict[str, str] = field(default_factory=dict)
    """members that have the settings of another one, by name, with the one that was run"""
    waiting: list[str] = field(default_factory=list)
    """members that are still to be run"""

    @classmethod
    def of(cls, model: str, results: Mapping[str, JSON], **others: Any) -> "ComparisonResult":
        """Rank what finished members left (`result_of`)."""
        found = standings(
            [result["bits_per_weight"][LINEARS] for result in results.values()],
            [result["bytes"] for result in results.values()],
            [result["evaluation"]["kl"] for result in results.values()],
        )
        rows = []
        for (name, result), standing in zip(results.items(), found):
            measured = result["evaluation"]
            row = {key: value for key, value in result.items() if key != "source_bytes"}
            row |= {"name": name, "standing": asdict(standing)}
            row["ratio"] = measured["perplexity"] / measured["baseline_perplexity"]
            rows.append(row)
        rows.sort(key=_order)
        original, text = {}, ""
        for result in results.values():
            text = result["evaluation"]["text"]
            original = {
                "bytes": result["source_bytes"],
                "perplexity": result["evaluation"]["baseline_perplexity"],
            }
        return cls(model=model, text=text, original=original, rows=rows, **others)

    def to_dict(self) -> JSON:
        """JSON values."""
        return {**asdict(self), "rule": RULE}


def result_of(recipe: JSON, summary: Summary, *, whole: bool, own_peak: bool) -> JSON:
    """What a finished member leaves.

    Args:
        recipe: every key of it.
        whole: whether the seconds are those of the whole run, not only since it was stopped.
        own_peak: whether the peak of memory is that of this member.
    """
    seconds = {name: round(value, 1) for name, value in summary.seconds.items()}
    return {
        "recipe": recipe,
        "bits_per_weight": summary.bits_per_weight,
        "bytes": summary.bytes_after,
        "source_bytes": summary.bytes_before,
        "evaluation": summary.evaluation,
        "cost": {
            "seconds": seconds,
            "whole": whole,
            "peak_memory_bytes": summary.peak_memory_bytes if own_peak else None,
        },
    }


def _order(row: JSON) -> tuple[int, int, str]:
    return row["standing"]["size_class"], row["standing"]["rank"], row["name"]
