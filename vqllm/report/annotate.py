"""Names beside points of a plot, and logarithmic axes with plain numbers."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from vqllm.report.labels import Point, place_labels

BACKING = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
"""Behind names, so that lines and the grid do not cross them."""
SPACING = 6
"""Typographic points between the places of a line that names keep clear of."""
NEAR = 9
"""Nearer to a named point than this, a line does not keep the name away."""


def name_points(
    axes: Any,
    names: Sequence[str],
    points: Sequence[Point],
    colors: Sequence[str] | None = None,
    others: Sequence[Point] = (),
    lines: Sequence[Sequence[Point]] = (),
) -> None:
    """Name every point, with a thin line to the names that are not beside their marker.

    The figure must have its final layout.

    Args:
        points: in data coordinates; those that are not finite get no name.
        colors: of the names; None for black.
        others: markers without a name, which names leave free.
        lines: drawn lines, from corner to corner, which names keep clear of.
    """
    chosen = colors or ["black"] * len(names)
    named = [row for row in zip(names, points, chosen) if all(map(math.isfinite, row[1]))]
    if not named:
        return
    to_points = 72 / axes.figure.dpi
    style: Any = {"fontsize": 8, "bbox": BACKING, "zorder": 2.5, "in_layout": False}
    texts = [
        axes.annotate(name, (0, 0), xycoords="figure points", color=color, **style)
        for name, _, color in named
    ]
    extents = [text.get_window_extent() for text in texts]
    frame = axes.get_window_extent()
    corners = (frame.x0, frame.y0, frame.x1, frame.y1)
    own = _on_page(axes, [point for _, point, _ in named])
    around = [*_on_page(axes, others), *_along(axes, lines)]
    places = place_labels(
        own,
        [(extent.width * to_points, extent.height * to_points) for extent in extents],
        tuple(corner * to_points for corner in corners),
        others=[place for place in around if all(math.dist(place, p) > NEAR for p in own)],
    )
    for text, place, (_, _, color) in zip(texts, places, named):
        text.xy = place.box[:2]
        text.set_position(place.box[:2])
        if place.line:
            pixels = [(x / to_points, y / to_points) for x, y in place.line]
            ends = axes.transData.inverted().transform(pixels)
            shade = "0.5" if colors is None else color
            axes.plot(*ends.T, color=shade, linewidth=0.5, zorder=2, scalex=False, scaley=False)


def plain_log_scale(axes: Any, span: float) -> None:
    """A logarithmic y axis with plain numbers, dense enough where it covers less than a decade.

    Args:
        span: the largest value over the smallest.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    if span < 6:
        steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    else:
        steps = (1, 2, 5) if span < 100 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _on_page(axes: Any, points: Sequence[Point]) -> list[Point]:
    """Data coordinates in typographic points of the page."""
    if not points:
        return []
    to_points = 72 / axes.figure.dpi
    return [(x, y) for x, y in axes.transData.transform(points) * to_points]


def _along(axes: Any, lines: Sequence[Sequence[Point]]) -> list[Point]:
    """Places on the lines, close enough that no name fits between two of them."""
    found: list[Point] = []
    for line in lines:
        corners = _on_page(axes, line)
        for (x0, y0), (x1, y1) in itertools.pairwise(corners):
            num = 1 + int(math.hypot(x1 - x0, y1 - y0) / SPACING)
            found += [(x0 + (x1 - x0) * i / num, y0 + (y1 - y0) * i / num) for i in range(num + 1)]
    return found
