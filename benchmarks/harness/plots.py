"""Figures of the reports: curves with bands, dots with error bars, scatter; PNG files, drawn without a display and
without pyplot."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.harness.labels import Named, label_ends, label_points
from benchmarks.harness.results import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

MUTED = "#8a8a8a"
REST = "#b4b4b4"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#333333", "#E69F00", "#56B4E9")
"""Okabe and Ito (2008), without the yellow that is too faint on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")

MARKED = 12  # points up to which a curve shows each


@dataclass(frozen=True)
class Style:
    """The colour and marker of one label; of the rest, which is grey and below, where it does not matter."""

    colour: str
    marker: str
    matters: bool = True

    @property
    def line(self) -> dict[str, Any]:
        return {"color": self.colour, "marker": self.marker, "markersize": 4.5, "zorder": 3 if self.matters else 2}


def styles(labels: Sequence[str], matter: Sequence[str] | None = None) -> dict[str, Style]:
    """A style for each label: a colour of its own for those that matter, in their order, grey for the rest.

    There are seven colours, and no two labels share one. So the first seven of `matter` matter, and all labels where
    there are no more than seven; without `matter`, or where none of it is among the labels, the first seven.
    """
    known = [label for label in matter or () if label in labels]
    if not known or len(labels) <= len(COLOURS):
        known = [*known, *(label for label in labels if label not in known)]
    places = {label: place for place, label in enumerate(known[: len(COLOURS)])}
    return {
        label: Style(COLOURS[places[label]], MARKERS[places[label]]) if label in places else Style(REST, "o", False)
        for label in labels
    }


@dataclass(frozen=True)
class Curves:
    """A panel: for each label its steps with summaries, as `Results.curve` gives; `marks` are vertical lines, such as
    the ends of experiences."""

    series: Mapping[str, Sequence[tuple[float, Summary]]]
    ylabel: str
    title: str = ""
    log: bool = False
    marks: Sequence[float] = ()


@dataclass(frozen=True)
class Dots:
    """A panel: for each label one summary, as `Results.final` gives, at `reference` a line to compare with."""

    values: Mapping[str, Summary | None]
    xlabel: str
    title: str = ""
    log: bool = False
    reference: float | None = None


@dataclass(frozen=True)
class Points:
    """A panel: for each label (x, y), as `Results.final` gives; a label of which either is None is left out."""

    values: Mapping[str, tuple[Summary | None, Summary | None]]
    xlabel: str
    ylabel: str
    title: str = ""
    log_x: bool = False
    log_y: bool = False


def plot_curves(
    path: Path, panels: Sequence[Curves], *, xlabel: str, labels: Sequence[str], matter: Sequence[str] | None = None
) -> Path:
    """Panels one below the other over a common axis, mean ± std. The curves that matter have colours and their names at
    their ends; the rest is grey, without spread, and named below.

    `labels` are all labels of the grid (`Results.labels`), `matter` those that matter (`styles`): they fix the colours,
    the same in each figure of a report.
    """
    used = {label for panel in panels for label, curve in panel.series.items() if curve}
    chosen = {label: style for label, style in styles(labels, matter).items() if label in used}
    figure = new_figure(8.6, 0.7 + 2.9 * len(panels))
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    ends = {axes: _draw_curves(axes, panel, chosen) for axes, panel in zip(all_axes, panels)}
    all_axes[-1].set_xlabel(xlabel)
    if all(float(step).is_integer() for panel in panels for curve in panel.series.values() for step, _ in curve):
        all_axes[-1].xaxis.get_major_locator().set_params(integer=True)
    name_the_rest(figure, chosen)
    label_ends(figure, ends)
    return saved(figure, path)


def _draw_curves(axes: Axes, panel: Curves, chosen: Mapping[str, Style]) -> list[Named]:
    """Draw a panel; returns the ends to label."""
    ends = []
    for mark in panel.marks:
        axes.axvline(mark, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
    for label, curve in panel.series.items():
        if not curve:
            continue
        style, steps, means = chosen[label], [step for step, _ in curve], [summary.mean for _, summary in curve]
        spreads = [summary.std or 0.0 for _, summary in curve]
        look = style.line | ({} if len(curve) <= MARKED else {"marker": ""})
        axes.plot(steps, means, linewidth=1.8 if style.matters else 1.1, **look)
        if style.matters and any(spreads):
            low, high = ([m + sign * s for m, s in zip(means, spreads)] for sign in (-1, 1))
            axes.fill_between(steps, low, high, color=style.colour, alpha=0.13, linewidth=0)
        drawn = [(x, y) for x, y in zip(steps, means) if math.isfinite(y) and (y > 0 or not panel.log)]
        if style.matters and drawn:
            ends.append(Named(label, *drawn[-1], style.colour))
    tidy(axes, panel.title, ylabel=panel.ylabel, log_y=panel.log)
    positive = [summary.mean for curve in panel.series.values() for _, summary in curve if summary.mean > 0]
    if panel.log and positive:  # a band that reaches below zero must not stretch the axis
        axes.set_ylim(bottom=max(axes.get_ylim()[0], min(positive) / 3))
        _plain_numbers(axes.yaxis)
    return ends


def plot_dots(
    path: Path, panels: Sequence[Dots], *, labels: Sequence[str], matter: Sequence[str] | None = None
) -> Path:
    """Panels side by side with one row per label, mean ± std, in the colours of `styles`. A label absent from one panel
    keeps its row there."""
    shown = [label for label in labels if any(panel.values.get(label) for panel in panels)]
    longest = max((len(label) for label in shown), default=0)
    figure = new_figure(0.08 * longest + 3.6 * len(panels) + 0.6, 1.2 + 0.3 * len(shown))
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels):
        if panel.reference is not None:
            axes.axvline(panel.reference, color=MUTED, linewidth=1.0, linestyle="--", zorder=0)
        for label, style in styles(labels, matter).items():
            if summary := panel.values.get(label):
                axes.errorbar(summary.mean, shown.index(label), xerr=summary.std, color=style.colour,
                              marker=style.marker, capsize=3, markersize=6.5)  # fmt: skip
        axes.set_yticks(range(len(shown)), [literal(label) for label in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        tidy(axes, panel.title, xlabel=panel.xlabel, log_x=panel.log)
        axes.tick_params(axis="y", length=0)
    return saved(figure, path)


def plot_scatter(
    path: Path, panels: Sequence[Points], *, labels: Sequence[str], matter: Sequence[str] | None = None
) -> Path:
    """Panels side by side, mean ± std in both directions. The points that matter have colours and their names beside
    them; the rest is grey, without spread, and named below. `labels` and `matter` as of `plot_curves`.

    ::

        points = {label: (results.final("kappa", label), results.final("accuracy", label)) for label in results.labels}
        plot_scatter(out / "s.png", [Points(points, "mean |κ|", "accuracy", log_x=True)], labels=results.labels)
    """
    used = {label for panel in panels for label, pair in panel.values.items() if None not in pair}
    chosen = {label: style for label, style in styles(labels, matter).items() if label in used}
    figure = new_figure(5.4 * len(panels), 4.6)
    named: dict[Axes, list[Named]] = {}
    others: dict[Axes, list[tuple[float, float]]] = {}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        known = {label: (x, y) for label, (x, y) in panel.values.items() if x is not None and y is not None}
        for label, (x, y) in known.items():
            style = chosen[label]
            axes.errorbar(
                x.mean, y.mean, xerr=x.std if style.matters else None, yerr=y.std if style.matters else None,
                elinewidth=1.0, capsize=2, markeredgecolor="white", markeredgewidth=0.6,
                **style.line | {"markersize": 7 if style.matters else 5},
            )  # fmt: skip
        tidy(axes, panel.title, panel.xlabel, panel.ylabel, panel.log_x, panel.log_y)
        named[axes] = [
            Named(label, x.mean, y.mean, chosen[label].colour) for label, (x, y) in known.items()
            if chosen[label].matters
        ]  # fmt: skip
        others[axes] = [(x.mean, y.mean) for label, (x, y) in known.items() if not chosen[label].matters]
        bars = [(x, y, part / 4) for label, (x, y) in known.items() if chosen[label].matters for part in range(-4, 5)]
        others[axes] += [(x.mean + part * (x.std or 0), y.mean) for x, y, part in bars]
        others[axes] += [(x.mean, y.mean + part * (y.std or 0)) for x, y, part in bars]
    name_the_rest(figure, chosen, linestyle="")
    label_points(figure, named, others)
    return saved(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """A figure of that size in inches, without pyplot, so that nothing global changes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes, title: str, xlabel: str = "", ylabel: str = "", log_x: bool = False, log_y: bool = False) -> None:
    """The title and the names of a panel's axes, logarithmic ones where asked for, a light grid, and no frame."""
    axes.set_title(literal(title), loc="left", fontsize=11)
    if xlabel:
        axes.set_xlabel(xlabel)
    if ylabel:
        axes.set_ylabel(ylabel)
    if log_x:
        axes.set_xscale("log", nonpositive="clip")
        _plain_numbers(axes.xaxis)
    if log_y:
        axes.set_yscale("log", nonpositive="clip")
        _plain_numbers(axes.yaxis)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(color=MUTED, labelsize=9)


def _plain_numbers(axis: Axis) -> None:
    """0.3 rather than 3 × 10⁻¹, where a logarithmic axis spans about a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    if low > 0 and high / low < 30:
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def name_the_rest(figure: Figure, chosen: Mapping[str, Style], **look: Any) -> None:
    """A line below the panels that says which labels are grey; `look` replaces parts of their style."""
    from matplotlib.lines import Line2D

    if rest := [literal(label) for label, style in chosen.items() if not style.matters]:
        unbroken = (label.replace(" ", "\N{NO-BREAK SPACE}") for label in rest)
        text = textwrap.fill(" · ".join(unbroken), int(12.5 * figure.get_figwidth()))
        shown: dict[str, Any] = {"color": REST, "linewidth": 1.1, "marker": "o", "markersize": 4.5} | look
        handle = Line2D([], [], label=text, **shown)
        figure.legend(handles=[handle], loc="outside lower left", frameon=False, fontsize=8, labelcolor=MUTED)


def legend(figure: Figure, chosen: Mapping[str, Style], *, above: bool = False, **look: Any) -> None:
    """The labels below the panels, or above them where others are named below, for figures of several panels with the
    same few; `look` replaces parts of their style."""
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], label=literal(name), **{"linewidth": 1.7} | style.line | look) for name, style in chosen.items()
    ]
    place: Literal["outside upper center", "outside lower center"]
    place = "outside upper center" if above else "outside lower center"
    figure.legend(handles=lines, loc=place, frameon=False, fontsize=9, ncols=min(4, len(lines)))


def literal(text: str) -> str:
    """A text that matplotlib shows as it is, dollars included, which would begin a formula."""
    return text.replace("$", r"\$")


def saved(figure: Figure, path: Path) -> Path:
    """Write a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
