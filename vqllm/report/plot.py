"""Plots: a run's proxy loss by layer, and codecs' distortion by rate."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from vqllm.core.protocols import JSON


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

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, told in curves.items():
        minutes = [look["seconds"] / 60 for look in told["looks"]]
        axes.plot(minutes, [look["kl"] for look in told["looks"]], marker="o", label=name)
    axes.set_xlabel("minutes of a core")
    axes.set_ylabel("KL divergence on held-out sequences")
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
    return png(figure)


def plot_codecs(rows: Sequence[JSON]) -> bytes:
    """A PNG: how far above Shannon's limit each measured codec is, by its rate, one colour a codec.

    Args:
        rows: of `codec_bench.bench`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    markers = "osD^vP*Xph<>8d"
    for i, codec in enumerate(sorted({row["codec"] for row in rows})):
        own = sorted((row["bits"], row["gap_db"]) for row in rows if row["codec"] == codec)
        style = {"marker": markers[i % len(markers)], "markersize": 5, "color": f"C{i % 10}"}
        axes.plot(*zip(*own), linestyle="none", label=codec, **style)
    axes.axhline(0, color="black", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bits a weight (codes)")
    axes.set_ylabel("distortion of a unit Gaussian above Shannon's limit, dB")
    axes.grid(alpha=0.3)
    if rows:
        axes.legend(fontsize=8, ncols=2)
    return png(figure)


def png(figure: Any) -> bytes:
    """The picture of a figure, the same bytes whenever it is drawn."""
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()
