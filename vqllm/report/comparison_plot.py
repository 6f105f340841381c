"""The plot of a comparison: quality by size, four panels, every member with its name."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from vqllm.core.pareto import pareto_front
from vqllm.core.protocols import JSON
from vqllm.report.labels import Point, place_labels
from vqllm.report.plot import png
from vqllm.report.summary import LINEARS

MARKERS = "osD^vPX*<>hd"
MOST_NAMES = 12
"""Members that are named in the panels; more of them are numbered, with one list of names."""
BACKING = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
"""Behind labels, so that the lines of the front and the grid do not cross them."""


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
        _draw(axes, points)
        axes.set_xlabel(size)
        axes.set_ylabel(loss)
        panels.append((axes, points))
    if numbered:
        _list_names(figure, rows)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # positions in pixels are final
    for axes, points in panels:
        _label(axes, points, names)
    return png(figure)


def _draw(axes: Any, points: Sequence[Point]) -> None:
    axes.margins(x=0.18, y=0.12)
    axes.grid(alpha=0.3)
    on_front = pareto_front(*zip(*points)) if points else []
    for i, (x, y) in enumerate(points):
        face = f"C{i % 10}" if on_front[i] else "white"
        style = {"marker": MARKERS[i % len(MARKERS)], "color": f"C{i % 10}", "zorder": 3}
        axes.plot([x], [y], linestyle="none", markersize=6, markerfacecolor=face, **style)
    front = sorted(point for point, chosen in zip(points, on_front) if chosen)
    if front:
        axes.step(*zip(*front), where="post", color="0.6", linewidth=1, zorder=1)
    finite = [y for _, y in points if math.isfinite(y)]
    if finite and min(finite) > 0 and max(finite) > 1.5 * min(finite):
        _log_scale(axes, max(finite) / min(finite))


def _log_scale(axes: Any, span: float) -> None:
    """A logarithmic axis with plain numbers, dense enough where it covers less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    if span < 6:
        steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    else:
        steps = (1, 2, 5) if span < 100 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _list_names(figure: Any, rows: Sequence[JSON]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="none", marker=MARKERS[i % len(MARKERS)], color=f"C{i % 10}")
        for i in range(len(rows))
    ]
    names = [f"{i} {row['name']}" for i, row in enumerate(rows, 1)]
    columns = 1 + (len(rows) - 1) // 50
    figure.legend(handles, names, loc="outside right upper", fontsize=8, ncols=columns)


def _label(axes: Any, points: Sequence[Point], names: Sequence[str]) -> None:
    """Name every point, with a line to the names that are not beside their marker."""
    to_points = 72 / axes.figure.dpi
    named = [(name, point) for name, point in zip(names, points) if all(map(math.isfinite, point))]
    if not named:
        return
    style: Any = {"fontsize": 8, "bbox": BACKING, "zorder": 2.5, "in_layout": False}
    texts = [axes.annotate(name, (0, 0), xycoords="figure points", **style) for name, _ in named]
    extents = [text.get_window_extent() for text in texts]
    frame = axes.get_window_extent()
    corners = (frame.x0, frame.y0, frame.x1, frame.y1)
    places = place_labels(
        [(x, y) for x, y in axes.transData.transform([p for _, p in named]) * to_points],
        [(extent.width * to_points, extent.height * to_points) for extent in extents],
        tuple(corner * to_points for corner in corners),
    )
    for text, place in zip(texts, places):
        text.xy = place.box[:2]
        text.set_position(place.box[:2])
        if place.line:
            pixels = [(x / to_points, y / to_points) for x, y in place.line]
            ends = axes.transData.inverted().transform(pixels)
            axes.plot(*ends.T, color="0.5", linewidth=0.5, zorder=2, scalex=False, scaley=False)
