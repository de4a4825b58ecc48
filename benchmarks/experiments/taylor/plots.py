"""The figures of the `taylor` experiment: the ratio against what might explain it, and errors against distance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.plots import new_figure, saved, tidy
from benchmarks.harness.styles import MUTED, styles
from benchmarks.harness.summary import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, Summary]]


@dataclass(frozen=True)
class Scatter:
    """A panel of measured points for each label, with the curves of a law: one for each label, or one under ""."""

    points: Mapping[str, Points]
    lines: Mapping[str, Sequence[tuple[float, float]]]
    xlabel: str
    title: str


@dataclass(frozen=True)
class Errors:
    """A panel of errors against distance, both logarithmic; `reference` is a distance to mark."""

    series: Mapping[str, Sequence[tuple[float, float]]]
    title: str
    reference: float | None = None


def plot_scatter(path: Path, panels: Sequence[Scatter], *, ylabel: str, labels: Sequence[str]) -> Path:
    """Panels side by side over logarithmic axes of their own, with a common vertical one."""
    figure = new_figure(4.6 * len(panels) + 1.2, 4.0)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    chosen = styles(labels)
    for axes, panel in zip(all_axes, panels):
        for label, line in panel.lines.items():
            colour = chosen[label].colour if label else MUTED
            axes.plot(*zip(*line), color=colour, linewidth=1.2, zorder=1)
        for label, points in panel.points.items():
            x, y, spread = zip(*((x, s.mean, s.std or 0.0) for x, s in points))
            style = chosen[label]
            axes.errorbar(x, y, spread, color=style.colour, marker=style.marker, linestyle="", markersize=5)
        axes.set_xscale("log")
        axes.set_xlabel(panel.xlabel)
        tidy(axes, panel.title)
    all_axes[0].set_ylabel(ylabel)
    _legend(figure, labels)
    return saved(figure, path)


def plot_errors(path: Path, panels: Sequence[Errors], *, columns: int = 2) -> Path:
    """Panels in rows, with one legend."""
    from matplotlib.ticker import LogLocator, NullFormatter

    labels = list(dict.fromkeys(label for panel in panels for label in panel.series))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(4.4 * columns + 2.2, 0.5 + 2.9 * rows)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    chosen = styles(labels)
    for axes, panel in zip(grid, panels):
        if panel.reference is not None:
            axes.axvline(panel.reference, color=MUTED, linewidth=1.0, linestyle="--", zorder=0)
        for label, points in panel.series.items():
            shown = [(x, y) for x, y in points if y > 0]
            if shown:
                axes.plot(*zip(*shown), linewidth=1.6, **chosen[label].line)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("distance ‖θ − a‖")
        tidy(axes, panel.title)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    _legend(figure, labels)
    return saved(figure, path)


def _legend(figure: Figure, labels: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    chosen = styles(labels)
    lines = [Line2D([], [], label=label, **chosen[label].line) for label in labels]
    figure.legend(handles=lines, loc="outside right upper", frameon=False, fontsize=9)
