"""The table of docs/choosing.md: a command for a number of bits and a time, with what it brings."""

from pathlib import Path

from vqllm import recipes
from vqllm.core.protocols import JSON
from vqllm.report.summary import LINEARS

ROOT = Path(__file__).resolve().parent.parent
TUNED = ROOT / "eval" / "results" / "tuning.json"

DEMO_MWEIGHTS = 106.17
"""Weights of the demo model's linears, in 10⁶."""

ROWS: tuple[tuple[float, str], ...] = (
    (1.5, "balanced"),
    *((2.0, preset) for preset in ("fast", "balanced", "tuned")),
    (2.5, "balanced"),
    *((3.0, preset) for preset in ("fast", "balanced", "tuned")),
    (3.5, "balanced"),
    *((4.0, preset) for preset in ("fast", "balanced")),
)
"""Bits and preset."""


def choices(results: JSON, tuned: JSON) -> str:
    """Markdown with a line for every command that was measured.

    Args:
        results: rows of `results_table.py`, by recipe.
        tuned: rows of `tuning_table.py`, by recipe.
    """
    lines = [
        "| bits | command | file | ratio | KL | minutes | s per 10⁶ weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for bits, preset in ROWS:
        name = recipes.best(bits, preset)
        if name in results:
            lines.append(_line(bits, preset, results[name], _seconds(results[name])))
        elif name in tuned:
            parts = tuned[name]["rounded"]["seconds"], tuned[name]["tuned"]["seconds"]
            seconds = parts[0]["quantization"] + parts[1]["tuning"]
            lines.append(_line(bits, preset, tuned[name]["tuned"], seconds))
    return "\n".join(lines) + "\n"


def _seconds(row: JSON) -> float:
    return row["seconds"]["quantization"]


def _line(bits: float, preset: str, row: JSON, seconds: float) -> str:
    measured = row["evaluation"]
    ratio = measured["perplexity"] / measured["baseline_perplexity"]
    option = "" if preset == "balanced" else f" --preset {preset}"
    return (
        f"| {row['bits_per_weight'][LINEARS]:.2f} "
        f"| `vqllm quantize MODEL --bits {bits:g}{option} --output DIR` "
        f"| {row['bytes'] / 1e6:.1f} MB | {ratio:.3f} | {measured['kl']:.3f} "
        f"| {seconds / 60:.0f} | {seconds / DEMO_MWEIGHTS:.0f} |"
    )
