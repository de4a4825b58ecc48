"""Labels beside what they name, in place of a legend: at the ends of curves and beside points, without overlaps."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

SIZE = 8.5
WIDEST = 26  # characters of a line
BESIDE = 1.025  # where labels of curves begin, in widths of the axes
AROUND = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))  # where a label of a point may stand
NEAR, FAR = 9, 22  # points of distance
GAP = 2.5  # points between labels


@dataclass(frozen=True)
class Named:
    """A text and the place in data that it names, the end of a curve or a point, in that colour."""

    text: str
    x: float
    y: float
    colour: str


def label_ends(figure: Figure, ends: Mapping[Axes, Sequence[Named]]) -> None:
    """Write the labels of each panel's curves at its right, in the order of the ends and as near to them as they fit,
    with a dotted line to each end. Call it last: the limits of the axes count."""
    written = {axes: [_beside(axes, end) for end in named] for axes, named in ends.items()}
    figure.draw_without_rendering()  # how high texts are, and where the ends lie
    for axes, labels in written.items():
        box = axes.bbox
        places = [float(axes.transData.transform(label.xy)[1]) for label in labels]
        places = [min(max(place, box.y0), box.y1) for place in places]
        heights = [_extent(label).height + GAP * figure.dpi / 72 for label in labels]
        for label, place in zip(labels, spread(places, heights, box.y0, box.y1)):
            label.set_position((BESIDE, (place - box.y0) / box.height))


def spread(wanted: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """The centres of boxes of these heights, in the order of the wanted ones, without overlaps and between `low` and
    `high`: of those the nearest to the wanted, in the mean square. Where they do not all fit they reach over both ends
    by as much.

    >>> spread([0.0, 0.0, 5.0], [1.0, 1.0, 1.0], -9.0, 9.0)
    [-0.5, 0.5, 5.0]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    if not order:
        return []
    offsets = [0.0]
    for below, above in pairwise(order):
        offsets.append(offsets[-1] + (heights[below] + heights[above]) / 2)
    blocks: list[tuple[float, int]] = []  # without their offsets centres only have to rise: isotonic regression
    for i, offset in zip(order, offsets):
        blocks.append((wanted[i] - offset, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (mean, count), (last, more) = blocks[-2:]
            blocks[-2:] = [((mean * count + last * more) / (count + more), count + more)]
    least, most = low + heights[order[0]] / 2, high - heights[order[-1]] / 2 - offsets[-1]
    if least > most:
        least = most = (least + most) / 2
    centres = [min(max(mean, least), most) for mean, count in blocks for _ in range(count)]
    found = dict(zip(order, (centre + offset for centre, offset in zip(centres, offsets))))
    return [found[i] for i in range(len(wanted))]


def label_points(
    figure: Figure, points: Mapping[Axes, Sequence[Named]], others: Mapping[Axes, Sequence[tuple[float, float]]]
) -> None:
    """Write the label of each point within the axes beside it, where it covers least of the labels before it, of all
    points (`others` have no label), and of what is outside. Call it last: the limits of the axes count."""
    written = {
        axes: [
            _beside(axes, point) for point in named
            if axes.bbox.contains(*axes.transData.transform((point.x, point.y)))
        ]
        for axes, named in points.items()
    }
    figure.draw_without_rendering()
    for axes, labels in written.items():
        every = [*(label.xy for label in labels), *others.get(axes, ())]
        pixels = [axes.transData.transform(xy) for xy in every]
        taken = [_box(float(x), float(y), 9, 9) for x, y in pixels if isfinite(x) and isfinite(y)]
        for label in sorted(labels, key=lambda label: -label.xy[0]):  # at the right there is least room
            taken.append(_settle(axes, label, taken, figure.dpi / 72))


def _settle(axes: Axes, label: Annotation, taken: Sequence[Bbox], scale: float) -> Bbox:
    """Move the label to the place about its point that covers least; returns its box. `scale` is that of pixels."""
    extent = _extent(label)
    x, y = axes.transData.transform(label.xy)
    found: list[tuple[float, int, Bbox]] = []
    for distance in (NEAR, FAR):
        for right, up in AROUND:
            box = _box(
                x + right * (distance * scale + extent.width / 2), y + up * (distance * scale + extent.height / 2),
                extent.width, extent.height,
            )  # fmt: skip
            outside = box.width * box.height - _shared(box, axes.bbox)
            found.append((sum(_shared(box, other) for other in taken) + outside, len(found), box))
    _, place, best = min(found)
    if label.arrow_patch is not None and place < len(AROUND):
        label.arrow_patch.set_visible(False)
    label.set_horizontalalignment("center")
    across, up = axes.transAxes.inverted().transform(((best.x0 + best.x1) / 2, (best.y0 + best.y1) / 2))
    label.set_position((float(across), float(up)))
    return best


def _beside(axes: Axes, named: Named) -> Annotation:
    from matplotlib.colors import to_rgb

    ink = tuple(0.78 * part for part in to_rgb(named.colour))  # light colours are hard to read as text
    return axes.annotate(
        textwrap.fill(named.text, WIDEST).replace("$", r"\$"), (named.x, named.y), xytext=(BESIDE, 0.5),
        textcoords="axes fraction", va="center", fontsize=SIZE, linespacing=1.0, color=ink, annotation_clip=False,
        arrowprops={
            "arrowstyle": "-", "color": named.colour, "linewidth": 0.8, "linestyle": (0, (1, 1.5)), "shrinkA": 1.5,
            "shrinkB": 1.5, "relpos": (0, 0.5),
        },
    )  # fmt: skip


def _extent(label: Annotation) -> Bbox:
    """That of the text without its line."""
    from matplotlib.text import Text

    return Text.get_window_extent(label)


def _box(x: float, y: float, width: float, height: float) -> Bbox:
    from matplotlib.transforms import Bbox

    return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)


def _shared(a: Bbox, b: Bbox) -> float:
    """The area of the overlap."""
    across, up = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(across, 0.0) * max(up, 0.0)
