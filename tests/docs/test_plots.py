"""Plots in which families can be told apart."""

import itertools
import json
import random

import pytest

from tests.support.pages import ROOT
from vqllm.report import annotate, plot
from vqllm.report.labels import overlap
from vqllm.report.plot import COLORS, MARKERS, NEAR_DB, best_line, plot_codecs, plot_tuning

ROWS = json.loads((ROOT / "eval" / "results" / "codecs.json").read_text(encoding="utf-8"))


def test_a_line_joins_the_best() -> None:
    rng = random.Random(0)
    for _ in range(50):
        points = [(rng.choice([1.0, 1.5, 2.0, 2.5, 3.0, 4.0]), rng.random()) for _ in range(9)]
        line = best_line(points)
        assert line == sorted(set(line))
        lowest = {x: min(y for a, y in points if a == x) for x, _ in points}
        assert all(lowest[x] == y for x, y in line)
        assert {min(lowest), max(lowest)} <= {x for x, _ in line}
        for x, y in lowest.items():  # what is left out is clearly above a line between others
            if (x, y) not in line:
                pairs = itertools.combinations(sorted(lowest.items()), 2)
                heights = [plot._height(a, b, x) for a, b in pairs if a[0] < x < b[0]]
                assert y >= min(heights) + NEAR_DB
    assert best_line([(2.0, 1.0)]) == [(2.0, 1.0)]


def test_colours_and_marks_do_not_repeat() -> None:
    num = max(30, len({row["codec"] for row in ROWS}))
    styles = {(COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i in range(num)}
    assert len(styles) == num
    assert len(set(COLORS)) >= len({row["codec"] for row in ROWS})


def test_names_hide_neither_each_other_nor_markers(monkeypatch: pytest.MonkeyPatch) -> None:
    places, points = [], []

    def recording(given, *arguments, **options):
        found = place_labels(given, *arguments, **options)
        places.extend(found)
        points.extend(given)
        return found

    place_labels = annotate.place_labels
    monkeypatch.setattr(annotate, "place_labels", recording)
    assert plot_codecs(ROWS).startswith(b"\x89PNG")
    boxes = [place.box for place in places]
    assert len(boxes) == len({row["codec"] for row in ROWS})
    assert all(overlap(a, b) == 0 for a, b in itertools.combinations(boxes, 2))
    for x0, y0, x1, y1 in boxes:
        assert not any(x0 < x < x1 and y0 < y < y1 for x, y in points)


def test_the_same_rows_give_the_same_picture_and_none_give_one() -> None:
    few = [row for row in ROWS if row["codec"] in ("trellis", "e8p")]
    assert plot_codecs(few) == plot_codecs(few)
    assert plot_codecs([]).startswith(b"\x89PNG")
    assert plot_tuning({}).startswith(b"\x89PNG")
    curves = json.loads((ROOT / "eval" / "results" / "tuning-curve.json").read_text())["curves"]
    assert plot_tuning(curves).startswith(b"\x89PNG")


def test_the_chart_of_the_readme_has_every_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "eval")
    import quality_chart

    results = ROOT / "eval" / "results"
    read = {
        name: json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("demo", "tuning", "peers")
    }
    named: list[str] = []
    monkeypatch.setattr(quality_chart, "name_points", lambda _, names, *a, **k: named.extend(names))
    assert quality_chart.chart(**read).startswith(b"\x89PNG")
    assert {*quality_chart.LINES.values(), quality_chart.TUNED_NAME} <= set(named)
    assert set(read["peers"]["rows"]) <= set(named)
    assert all(row["source"] for row in read["peers"]["rows"].values())
