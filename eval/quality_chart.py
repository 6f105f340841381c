"""docs/quality.png: KL divergence by size of the recipes and of other quantizers on the demo model.

    python eval/quality_chart.py

Draws what eval/results/demo.json, tuning.json and peers.json hold.
"""

import json
from pathlib import Path
from typing import Any

from vqllm import recipes
from vqllm.core.protocols import JSON
from vqllm.report.annotate import name_points, plain_log_scale
from vqllm.report.labels import Point
from vqllm.report.plot import COLORS, FAINT, png
from vqllm.report.summary import LINEARS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results"
CHART = ROOT / "docs" / "quality.png"
LINES = {"fast": "--preset fast", "balanced": "default"}
"""What the line of a preset is called."""
TUNED_NAME = "--preset tuned"
PEERS = {"llama.cpp": ("s", "#6b6b6b"), "bitsandbytes": ("D", "#7f5200"), "HQQ": ("^", "#6a3d9a")}
"""Mark and colour of the peers whose names begin so."""


def main() -> None:
    read = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in _FILES}
    CHART.write_bytes(chart(**read))


_FILES = ("demo", "tuning", "peers")


def chart(demo: JSON, tuning: JSON, peers: JSON) -> bytes:
    """A PNG: a line for each preset, a dot for every other recipe, a mark for every peer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines = _lines(demo, tuning)
    drawn = {point for line in lines.values() for point in line}
    others = sorted({_place(row) for row in demo.values()} - drawn)
    axes.plot(*zip(*others), linestyle="none", color="0.4", **FAINT)
    for (line, color), mark in zip(zip(lines.values(), COLORS), "oDv*"):
        size = 11 if mark == "*" else 7
        axes.plot(*zip(*line), marker=mark, markersize=size, markeredgecolor="white", color=color)
    points = {name: (row["bits_per_weight"], row["kl"]) for name, row in peers["rows"].items()}
    styles = {name: next(PEERS[key] for key in PEERS if name.startswith(key)) for name in points}
    for name, (x, y) in points.items():
        mark, color = styles[name]
        axes.plot([x], [y], linestyle="none", marker=mark, markersize=7, color=color, zorder=3)
    every = [*others, *drawn, *points.values()]
    plain_log_scale(axes, max(y for _, y in every) / min(y for _, y in every))
    axes.margins(x=0.16, y=0.06)
    axes.set_xlabel("bits a weight of the linears, scales and tables included")
    axes.set_ylabel("KL divergence from the original's predictions, nats a token")
    axes.grid(alpha=0.25)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # positions in pixels are final
    name_points(
        axes,
        [*lines, *points],
        [*(line[0] for line in lines.values()), *points.values()],
        [*COLORS[: len(lines)], *(styles[name][1] for name in points)],
        others=[*others, *drawn],
        lines=list(lines.values()),
    )
    return png(figure)


def _lines(demo: JSON, tuning: JSON) -> dict[str, list[Point]]:
    """The places of the measured recipes of every preset, by rate."""
    found = {
        called: [
            _place(demo[name])
            for name in (recipes.best(bits, preset) for bits in recipes.BITS)
            if name in demo
        ]
        for preset, called in LINES.items()
    }
    found[TUNED_NAME] = sorted(_place(row["tuned"]) for row in tuning.values())
    return found


def _place(row: Any) -> Point:
    return row["bits_per_weight"][LINEARS], row["evaluation"]["kl"]


if __name__ == "__main__":
    main()
