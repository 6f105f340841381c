"""The plot of a run: proxy loss by layer, one line a kind of linear."""

import io
from collections.abc import Sequence

from vqllm.types import JSON


def plot_proxy_loss(records: Sequence[JSON]) -> bytes:
    """A PNG. The same records give the same picture."""
    # The object interface, not pyplot: no global state and no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    kinds: dict[str, list[tuple[int, float]]] = {}
    for record in records:
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
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()
