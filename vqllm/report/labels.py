"""Where the names of points go in a plot, so that all of them can be read."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""x0, y0, x1, y1"""
Line = tuple[Point, Point]

GAPS = (7, 18, 30, 44, 60, 80)
"""Between a marker and the side of its label."""
SHIFTS = range(-20, 21)
"""How far a label is above or below its marker, in 3/5 of its height."""
MARKER, ROOM = 4.5, 8
"""Half of a marker, and of the width around it that labels of others leave free."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a label stands, and the line that ties it to its marker if it is not beside it."""

    box: Box
    line: Line | None
    distance: float


def place_labels(
    points: Sequence[Point], sizes: Sequence[Point], frame: Box, others: Sequence[Point] = ()
) -> list[Place]:
    """A place for the label of every point: inside the frame, and clear of markers, of other labels
    and of their lines wherever there is room for that.

    Greedy, from the highest point down.

    Args:
        points: positions of the markers. All lengths are typographic points.
        sizes: width and height of the labels.
        frame: the panel.
        others: markers without a label, which labels leave free as well.
    """
    panel = _Panel(frame)
    found: dict[int, Place] = {}
    for i in sorted(range(len(points)), key=lambda i: (-points[i][1], points[i][0])):
        rest = [point for j, point in enumerate(points) if j != i]
        best = panel.best(_places(points[i], sizes[i]), [*rest, *others])
        panel.boxes.append(best.box)
        if best.line:
            panel.lines.append(best.line)
        found[i] = best
    return [found[i] for i in range(len(points))]


def _places(point: Point, size: Point) -> list[Place]:
    """Beside a point, to the right of it rather than to the left, and further and further away."""
    (x, y), (width, height) = point, size
    found = []
    for gap, shift, side in itertools.product(GAPS, SHIFTS, (1, -1)):
        left = x + gap if side > 0 else x - gap - width
        bottom = y + 0.6 * shift * height - height / 2
        end = (left if side > 0 else left + width, bottom + height / 2)
        place = Place(
            box=(left, bottom, left + width, bottom + height),
            line=(point, end) if gap > GAPS[0] or shift else None,
            distance=0.6 * abs(shift) * height + (gap - GAPS[0]) + 2 * (side < 0),
        )
        found.append(place)
    return sorted(found, key=lambda place: place.distance)


@dataclass
class _Panel:
    """What is drawn so far."""

    frame: Box
    boxes: list[Box] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)

    def best(self, places: Sequence[Place], others: Sequence[Point]) -> Place:
        """The cheapest of places that come in order of their distance."""
        best, least = places[0], self.cost(places[0], others)
        for place in places:
            if place.distance >= least:  # no place costs less than its distance
                break
            cost = self.cost(place, others)
            if cost < least:
                best, least = place, cost
        return best

    def cost(self, place: Place, others: Sequence[Point]) -> float:
        """How bad a place is: in the way of something is worse than far away. `others` are the
        other markers."""
        box, line = place.box, place.line
        outside = max(0, self.frame[0] - box[0]) + max(0, self.frame[1] - box[1])
        outside += max(0, box[2] - self.frame[2]) + max(0, box[3] - self.frame[3])
        cost = place.distance + 20 * outside
        cost += sum(2 * overlap(box, other) for other in self.boxes)
        cost += sum(2 * overlap(box, _around(other, ROOM)) for other in others)
        cost += sum(20 * _hits(other, box) for other in self.lines)
        if line:
            cost += sum(20 * _hits(line, other) for other in self.boxes)
            cost += sum(10 * _hits(line, _around(other, MARKER)) for other in others)
            cost += sum(40 * _cross(line, other) for other in self.lines)
        return cost


def overlap(a: Box, b: Box) -> float:
    """The area that two boxes share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _around(point: Point, half_width: float) -> Box:
    x, y = point
    return x - half_width, y - MARKER, x + half_width, y + MARKER


def _hits(line: Line, box: Box) -> int:
    """How much of a line is in a box, in sixteenths. Its beginning is not counted: markers that
    overlap cannot be left without crossing each other."""
    (x0, y0), (x1, y1) = line
    along = [(x0 + (x1 - x0) * i / 16, y0 + (y1 - y0) * i / 16) for i in range(5, 16)]
    return sum(box[0] < x < box[2] and box[1] < y < box[3] for x, y in along)


def _cross(a: Line, b: Line) -> bool:
    """Whether two lines cross."""

    def side(line: Line, point: Point) -> float:
        (x0, y0), (x1, y1) = line
        return (x1 - x0) * (point[1] - y0) - (y1 - y0) * (point[0] - x0)

    return side(a, b[0]) * side(a, b[1]) < 0 and side(b, a[0]) * side(b, a[1]) < 0
