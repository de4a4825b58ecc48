"""Colours, dashes and markers that stay apart for colour-blind eyes, and in black and white."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MUTED = "#8a8a8a"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
"""Okabe and Ito (2008), without the yellow that is too faint on white."""
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.4, 1.2, 1.4)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")


@dataclass(frozen=True)
class Style:
    """How one label is drawn."""

    colour: str
    dash: Any
    marker: str

    @property
    def line(self) -> dict[str, Any]:
        return {"color": self.colour, "linestyle": self.dash, "marker": self.marker, "markersize": 4.5}


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """A style for each label, by its place: colours repeat after seven, then with other dashes; markers after nine."""
    return {
        label: Style(COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)], MARKERS[i % len(MARKERS)])
        for i, label in enumerate(labels)
    }
