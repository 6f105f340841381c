"""The plot of a comparison: quality by size, four panels, every member with its name."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from vqllm.core.pareto import pareto_front
from vqllm.core.protocols import JSON
from vqllm.report.annotate import name_points, plain_log_scale
from vqllm.report.labels import Point
from vqllm.report.plot import png
from vqllm.report.summary import LINEARS

MARKERS = "osD^vPX*<>hd"
MOST_NAMES = 12
"""Members that are named in the panels; more of them are numbered, with one list of names."""


def plot_comparison(rows: Sequence[JSON]) -> bytes:
    """A PNG. The same members give the same picture.

    Above the ratio of the perplexities, below KL divergence; left by bits per weight of the
    linears, right by size of the file. The line is the Pareto front of its panel, whose members
    have filled markers.

    Args:
        rows: of `ComparisonResult`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 10), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    numbered = len(rows) > MOST_NAMES
    names = [str(i) if numbered else row["name"] for i, row in enumerate(rows, 1)]
    sizes = {
        "bits per weight of the linears": [row["bits_per_weight"][LINEARS] for row in rows],
        "size of the file, MB": [row["bytes"] / 1e6 for row in rows],
    }
    losses = {
        "perplexity, ratio to the original": [row["ratio"] for row in rows],
        "KL divergence, nats per token": [row["evaluation"]["kl"] for row in rows],
    }
    panels = []
    grid = figure.subplots(2, 2).flat
    for axes, (loss, size) in zip(grid, itertools.product(losses, sizes)):
        points = list(zip(sizes[size], losses[loss]))
        front = _draw(axes, points)
        axes.set_xlabel(size)
        axes.set_ylabel(loss)
        panels.append((axes, points, front))
    if numbered:
        _list_names(figure, rows)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # positions in pixels are final
    for axes, points, front in panels:
        name_points(axes, names, points, lines=[front])
    return png(figure)


def _draw(axes: Any, points: Sequence[Point]) -> list[Point]:
    """Markers and the Pareto front, whose corners are returned."""
    axes.margins(x=0.18, y=0.12)
    axes.grid(alpha=0.3)
    on_front = pareto_front(*zip(*points)) if points else []
    for i, (x, y) in enumerate(points):
        face = f"C{i % 10}" if on_front[i] else "white"
        style = {"marker": MARKERS[i % len(MARKERS)], "color": f"C{i % 10}", "zorder": 3}
        axes.plot([x], [y], linestyle="none", markersize=6, markerfacecolor=face, **style)
    members = sorted(point for point, chosen in zip(points, on_front) if chosen)
    corners = members[:1]
    for (_, before), (x, y) in itertools.pairwise(members):
        corners += [(x, before), (x, y)]
    if corners:
        axes.plot(*zip(*corners), color="0.6", linewidth=1, zorder=1)
    finite = [y for _, y in points if math.isfinite(y)]
    if finite and min(finite) > 0 and max(finite) > 1.5 * min(finite):
        plain_log_scale(axes, max(finite) / min(finite))
    return [corner for corner in corners if all(map(math.isfinite, corner))]


def _list_names(figure: Any, rows: Sequence[JSON]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="none", marker=MARKERS[i % len(MARKERS)], color=f"C{i % 10}")
        for i in range(len(rows))
    ]
    names = [f"{i} {row['name']}" for i, row in enumerate(rows, 1)]
    columns = 1 + (len(rows) - 1) // 50
    figure.legend(handles, names, loc="outside right upper", fontsize=8, ncols=columns)
