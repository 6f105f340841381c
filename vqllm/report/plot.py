"""Plots: proxy loss by layer, tuning by time, and codecs' distortion by rate."""

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from vqllm.core.protocols import JSON
from vqllm.report.annotate import name_points
from vqllm.report.labels import Point

MARKERS = "osD^vPX*<>hdp8"
COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7f5200", "#56b4e9", "#6b6b6b", "#b8860b"),
    *("#6a3d9a", "#e31a1c", "#33a02c", "#1f3fbf", "#b000b0", "#000000", "#00a5a5"),
)
"""One for each codec; most of the first eight are those of Okabe and Ito."""
NEAR_DB = 0.15
"""How far above the best line a configuration may be to lie on it."""
FAINT = {"marker": "o", "markersize": 3, "alpha": 0.35, "zorder": 1.5}
"""Points that are measured, but not the best."""


def plot_proxy_loss(records: Sequence[JSON]) -> bytes:
    """A PNG. The same records give the same picture."""
    # The object interface, not pyplot: no global state and no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    kinds: dict[str, list[tuple[int, float]]] = {}
    for record in (record for record in records if record["layer"] is not None):
        kind = record["name"].rsplit(".", 1)[-1]
        kinds.setdefault(kind, []).append((record["layer"], record["proxy_loss"]))
    for kind, points in kinds.items():
        layers, losses = zip(*sorted(points))
        axes.plot(layers, losses, marker="o", markersize=3, linewidth=1, label=kind)
    if any(record["proxy_loss"] > 0 for record in records):
        axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("proxy loss")
    axes.grid(alpha=0.3)
    if kinds:
        axes.legend(fontsize=8, ncols=2)
    return png(figure)


def plot_tuning(curves: Mapping[str, JSON]) -> bytes:
    """A PNG: KL divergence on held-out sequences by CPU time of tuning, a line for each recipe.

    Args:
        curves: by the name of a recipe, `looks` with `seconds` of CPU time and `kl`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines = [
        [(look["seconds"] / 60, look["kl"]) for look in curve["looks"]] for curve in curves.values()
    ]
    colors = [COLORS[i % len(COLORS)] for i in range(len(lines))]
    for i, line in enumerate(lines):
        style = {"marker": MARKERS[i % len(MARKERS)], "markersize": 6, "color": colors[i]}
        axes.plot(*zip(*line), markeredgecolor="white", **style)
    axes.margins(x=0.08)
    axes.set_xlabel("minutes of a core")
    axes.set_ylabel("KL divergence on held-out sequences, nats per token")
    axes.grid(alpha=0.3)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # positions in pixels are final
    looks = [look for line in lines for look in line]
    ends = [line[-1] for line in lines]
    name_points(axes, list(curves), ends, colors, others=looks, lines=lines)
    return png(figure)


def plot_codecs(rows: Sequence[JSON]) -> bytes:
    """A PNG: how far above Shannon's limit each codec is, by its rate.

    Every configuration is a faint dot. The line of a codec joins its best ones, and passes below
    rates at which only quick ones were measured.

    Args:
        rows: of `codec_bench.bench`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = sorted({row["codec"] for row in rows})
    dots = {
        name: sorted((row["bits"], row["gap_db"]) for row in rows if row["codec"] == name)
        for name in names
    }
    best = {name: best_line(dots[name]) for name in names}
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    for i, name in enumerate(names):
        mark = MARKERS[i % len(MARKERS)]
        style = {"marker": mark, "markersize": 10 if mark == "*" else 7, "linewidth": 1.3}
        axes.plot(*zip(*dots[name]), linestyle="none", color=colors[name], **FAINT)
        axes.plot(*zip(*best[name]), color=colors[name], markeredgecolor="white", **style)
    axes.margins(x=0.08)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bits a weight (codes)")
    axes.set_ylabel("distortion of a unit Gaussian above Shannon's limit, dB")
    axes.grid(alpha=0.2)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # positions in pixels are final
    name_points(
        axes,
        names,
        [best[name][-1] for name in names],
        [colors[name] for name in names],
        others=[dot for name in names for dot in dots[name]],
        lines=[best[name] for name in names],
    )
    return png(figure)


def best_line(points: Sequence[Point]) -> list[Point]:
    """The lowest point of each x that is on the lower convex hull, or less than `NEAR_DB` above it.

    Without the rest a line would jump up wherever only quick configurations were measured.
    """
    lowest = dict(sorted(points, reverse=True))
    corners: list[Point] = []
    for x, y in sorted(lowest.items()):  # Andrew's monotone chain
        while len(corners) > 1 and y < _height(corners[-2], corners[-1], x):
            corners.pop()
        corners.append((x, y))
    found = [corners[0]]
    for left, right in itertools.pairwise(corners):
        between = [(x, y) for x, y in sorted(lowest.items()) if left[0] < x < right[0]]
        found += [(x, y) for x, y in between if y < _height(left, right, x) + NEAR_DB]
        found.append(right)
    return found


def _height(left: Point, right: Point, x: float) -> float:
    """The line through two points, at x."""
    (x0, y0), (x1, y1) = left, right
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def png(figure: Any) -> bytes:
    """The picture of a figure, the same bytes whenever it is drawn."""
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()
