"""The table and the pages about a comparison of recipes.

All take what `ComparisonResult.to_dict` returns.
"""

import json

from vqllm.core import local_paths
from vqllm.core.protocols import JSON
from vqllm.report.comparison_plot import plot_comparison
from vqllm.report.pages import PAGE, markdown_table
from vqllm.report.summary import LABELS

COMPARISON_PAGE, COMPARISON_JSON, COMPARISON_PLOT = (
    "comparison.md",
    "comparison.json",
    "comparison.png",
)
HEAD = (
    "recipe",
    "bits: codes / linears / file",
    "MB",
    "perplexity",
    "ratio",
    "KL",
    "top-1",
    "seconds",
    "memory",
    "rank",
    "front",
)


def comparison_pages(result: JSON, command: str) -> dict[str, bytes]:
    """The pages by file name, with names in place of local paths."""
    result, command = local_paths.in_values(result), local_paths.in_command(command)
    return {
        COMPARISON_PLOT: plot_comparison(result["rows"]),
        COMPARISON_JSON: (json.dumps(result, indent=1, sort_keys=True) + "\n").encode(),
        COMPARISON_PAGE: _page(result, command).encode(errors="replace"),
    }


def comparison_rows(result: JSON) -> list[tuple[str, ...]]:
    """A line a member, best first among members of about equal size, and one for the original."""
    rows = [(_name(row), *_figures(row)) for row in result["rows"]]
    if original := result["original"]:
        size, perplexity = f"{original['bytes'] / 1e6:.1f}", f"{original['perplexity']:.2f}"
        rows.append(("original", "", size, perplexity, "1.000", *[""] * 6))
    rows += [(name, "failed", *[""] * 9) for name in result["failed"]]
    return rows + [(name, "to be run", *[""] * 9) for name in result["waiting"]]


def comparison_notes(result: JSON) -> list[str]:
    """The sentences below the table: what was measured, how, and what failed."""
    notes = [f"Measured on {result['text']}."] if result["text"] else []
    notes += [result["rule"]]
    if not all(row["cost"]["whole"] for row in result["rows"]):
        notes.append("A run that was stopped took longer than the seconds (≥) since it went on.")
    notes += [f"{name} is {other}: the settings are the same." for name, other in _repeated(result)]
    return notes + [f"{name} failed: {error}" for name, error in result["failed"].items()]


def _name(row: JSON) -> str:
    """A member's name and, where it was tuned, by what."""
    stages = (row["recipe"].get("tune") or {}).get("stages", [])
    return " + ".join([row["name"], *(stage["type"] for stage in stages)])


def _figures(row: JSON) -> tuple[str, ...]:
    measured, cost, standing = row["evaluation"], row["cost"], row["standing"]
    # What it takes to make the model; its evaluation is not counted.
    seconds = sum(cost["seconds"].get(phase, 0) for phase in ("quantization", "tuning"))
    front = [word for word in ("bits", "file") if standing[f"front_{word}"]]
    peak = cost["peak_memory_bytes"]
    return (
        " / ".join(f"{row['bits_per_weight'][label]:.2f}" for label in LABELS),
        f"{row['bytes'] / 1e6:.1f}",
        f"{measured['perplexity']:.2f}",
        f"{row['ratio']:.3f}",
        f"{measured['kl']:.4f}",
        f"{100 * measured['top1']:.1f} %",
        ("" if cost["whole"] else "≥ ") + f"{seconds:.0f}",
        "" if peak is None else f"{peak / 1e6:.0f} MB",
        f"{standing['rank']} of {standing['num_ranked']}",
        ", ".join(front),
    )


def _repeated(result: JSON) -> list[tuple[str, str]]:
    return list(result["repeated"].items())


def _page(result: JSON, command: str) -> str:
    pages = {_name(row): f"{row['name']}/{PAGE}" for row in result["rows"]}
    rows = [
        (f"[{name}]({pages[name]})" if name in pages else name, *cells)
        for name, *cells in comparison_rows(result)
    ]
    return "\n".join(
        [
            f"# Recipes on {result['model']}",
            "",
            "    " + command,
            "",
            markdown_table(HEAD, rows),
            *(f"{' '.join(note.split())}\n" for note in comparison_notes(result)),
            f"![perplexity and KL divergence by size]({COMPARISON_PLOT})",
            "",
        ]
    )
