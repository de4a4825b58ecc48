"""Figures of the reports: curves with bands, dots with error bars, scatter, accuracy matrices; PNG files, drawn without
a display and without pyplot."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from benchmarks.harness.results import Results, Summary, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

MUTED = "#8a8a8a"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
"""Okabe and Ito (2008), without the yellow that is too faint on white."""
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.4, 1.2, 1.4)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")

Matrix: TypeAlias = Sequence[Sequence[Summary | float | None]]
"""Accuracies a[t][j] on experience j after experience t; None, or not a number, where nothing is known."""
METRIC = "accuracy/experience_{}"
LEGIBLE = 12  # experiences up to which the cells have room for numbers
ACROSS = 4  # matrices in a row


@dataclass(frozen=True)
class Style:
    """The colour, dashes and marker of one label."""

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


def plot_curves(path: Path, panels: Sequence[Curves], *, xlabel: str, labels: Sequence[str]) -> Path:
    """Panels one below the other over a common axis, mean ± std, with one legend at the right.

    `labels` are all labels of the grid (`Results.labels`): they fix the colours, the same in each figure of a report.
    """
    used = {label for panel in panels for label in panel.series}
    figure = new_figure(8.6, max(0.7 + 2.9 * len(panels), 0.4 + 0.24 * len(used)))
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    chosen = styles(labels)
    for axes, panel in zip(all_axes, panels):
        _draw_curves(axes, panel, chosen)
    all_axes[-1].set_xlabel(xlabel)
    if all(float(step).is_integer() for panel in panels for curve in panel.series.values() for step, _ in curve):
        all_axes[-1].xaxis.get_major_locator().set_params(integer=True)
    legend(figure, chosen, used)
    return saved(figure, path)


def _draw_curves(axes: Axes, panel: Curves, chosen: Mapping[str, Style]) -> None:
    for mark in panel.marks:
        axes.axvline(mark, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
    for place, (label, curve) in enumerate(panel.series.items()):
        every = max(1, len(curve) // 10)
        steps = [step for step, _ in curve]
        means = [summary.mean for _, summary in curve]
        spreads = [summary.std or 0.0 for _, summary in curve]
        axes.plot(steps, means, linewidth=1.7, markevery=(place % every, every), **chosen[label].line)
        if any(spreads):
            low, high = ([m + sign * s for m, s in zip(means, spreads)] for sign in (-1, 1))
            axes.fill_between(steps, low, high, color=chosen[label].colour, alpha=0.15, linewidth=0)
    tidy(axes, panel.title, ylabel=panel.ylabel, log_y=panel.log)
    positive = [summary.mean for curve in panel.series.values() for _, summary in curve if summary.mean > 0]
    if panel.log and positive:  # a band that reaches below zero must not stretch the axis
        axes.set_ylim(bottom=max(axes.get_ylim()[0], min(positive) / 3))


def plot_dots(path: Path, panels: Sequence[Dots], *, labels: Sequence[str]) -> Path:
    """Panels side by side with one row per label, mean ± std. A label absent from one panel keeps its row there."""
    shown = [label for label in labels if any(panel.values.get(label) for panel in panels)]
    longest = max((len(label) for label in shown), default=0)
    figure = new_figure(0.08 * longest + 3.6 * len(panels) + 0.6, 1.2 + 0.3 * len(shown))
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels):
        if panel.reference is not None:
            axes.axvline(panel.reference, color=MUTED, linewidth=1.0, linestyle="--", zorder=0)
        for label, style in styles(labels).items():
            if summary := panel.values.get(label):
                axes.errorbar(summary.mean, shown.index(label), xerr=summary.std, color=style.colour,
                              marker=style.marker, capsize=3, markersize=6.5)  # fmt: skip
        axes.set_yticks(range(len(shown)), [literal(label) for label in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        tidy(axes, panel.title, xlabel=panel.xlabel, log_x=panel.log)
        axes.tick_params(axis="y", length=0)
    return saved(figure, path)


def plot_scatter(path: Path, panels: Sequence[Points], *, labels: Sequence[str]) -> Path:
    """Panels side by side, mean ± std in both directions, with one legend at the right.

    `labels` are all labels of the grid (`Results.labels`): they fix the colours, the same in each figure of a report.

    ::

        points = {label: (results.final("kappa", label), results.final("accuracy", label)) for label in results.labels}
        plot_scatter(out / "s.png", [Points(points, "mean |κ|", "accuracy", log_x=True)], labels=results.labels)
    """
    used = {label for panel in panels for label, pair in panel.values.items() if None not in pair}
    figure = new_figure(4.6 * len(panels) + 2.6, max(3.9, 0.5 + 0.24 * len(used)))
    chosen = styles(labels)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for label, (x, y) in panel.values.items():
            if x is not None and y is not None:
                axes.errorbar(
                    x.mean, y.mean, xerr=x.std, yerr=y.std, color=chosen[label].colour, marker=chosen[label].marker,
                    markersize=7, markeredgecolor="white", markeredgewidth=0.6, elinewidth=1.0, capsize=2, alpha=0.95,
                )  # fmt: skip
        tidy(axes, panel.title, panel.xlabel, panel.ylabel, panel.log_x, panel.log_y)
    legend(figure, chosen, used, linestyle="")
    return saved(figure, path)


def accuracy_matrices(results: Results, label: str | None = None, metric: str = METRIC) -> dict[int, list[list[Any]]]:
    """By seed: a[t][j] for j ≤ t, the accuracy on experience j after experience t, from records
    ``accuracy/experience_<j>`` at the step where each experience ended.

    Experiences that have not been seen are None, whatever was measured on them. A seed of which an experience is
    missing is left out.
    """
    values: dict[int, dict[int, dict[int, float]]] = {}  # by seed, step and experience
    count = 0
    while rows := results.select(metric.format(count), results.label if label is None else label):
        for row in rows:
            if row["step"] is not None:
                values.setdefault(row["seed"], {}).setdefault(row["step"], {})[count] = row["value"]
        count += 1
    return {
        seed: [[at[step].get(j) if j <= t else None for j in range(count)] for t, step in enumerate(sorted(at))]
        for seed, at in values.items() if len(at) == count
    }  # fmt: skip


def accuracy_matrix(results: Results, label: str | None = None, metric: str = METRIC) -> list[list[Summary | None]]:
    """The mean and standard deviation over seeds of each a[t][j] (`accuracy_matrices`); empty where there is none."""
    matrices = accuracy_matrices(results, label, metric).values()

    def over_seeds(cells: Sequence[float | None]) -> Summary | None:
        known = [cell for cell in cells if cell is not None]
        return summarise(known) if known else None

    return [[over_seeds(cells) for cells in zip(*rows)] for rows in zip(*matrices)]


def plot_matrices(path: Path, matrices: Mapping[str, Matrix], *, title: str = "accuracy") -> Path:
    """One heat map for each label, a common scale from 0 to 1, numbers in the cells of up to twelve experiences.

    ::

        plot_matrices(out / "matrices.png", {label: accuracy_matrix(results, label) for label in shown})
    """
    drawn = {label: matrix for label, matrix in matrices.items() if matrix}
    if not drawn:
        raise ValueError("There is no matrix to draw. Leave the figure out where all are empty.")
    across = min(ACROSS, len(drawn))
    down = math.ceil(len(drawn) / across)
    side = min(3.9, max(2.3, 0.42 * max(map(len, drawn.values())) + 0.7))
    titles = [literal(textwrap.fill(label, int(11 * side))) for label in drawn]
    lines = max(written.count("\n") + 1 for written in titles)
    figure = new_figure(side * across + 0.9, (side + 0.3 + 0.2 * lines) * down + 0.2)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes in panels[len(drawn) :]:
        axes.set_visible(False)
    for number, (axes, name, matrix) in enumerate(zip(panels, titles, drawn.values())):
        image = _draw_matrix(axes, matrix)
        axes.set_title(name, fontsize=9.5, loc="left")
        if number % across == 0:
            axes.set_ylabel("after experience", fontsize=9)
        if number + across >= len(drawn):
            axes.set_xlabel("accuracy on experience", fontsize=9)
    figure.colorbar(image, ax=panels, label=title, shrink=min(1.0, 0.9 / down + 0.15), aspect=24, pad=0.02)
    return saved(figure, path)


def _draw_matrix(axes: Axes, matrix: Matrix) -> AxesImage:
    import numpy as np

    values = np.array([[getattr(cell, "mean", cell) for cell in row] for row in matrix], dtype=float)  # None is nan
    image = axes.imshow(values, vmin=0.0, vmax=1.0, cmap="cividis")
    rows, columns = values.shape
    if max(rows, columns) <= LEGIBLE:
        for (t, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                ink = "white" if value < 0.55 else "black"
                axes.text(j, t, f"{value:.2f}".replace("0.", "."), ha="center", va="center", fontsize=7.5, color=ink)
    every = max(1, math.ceil(columns / LEGIBLE))
    axes.set_xticks(range(0, columns, every), map(str, range(1, columns + 1, every)))
    axes.set_yticks(range(0, rows, every), map(str, range(1, rows + 1, every)))
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    return image


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


def legend(figure: Figure, chosen: Mapping[str, Style], used: Collection[str], **look: Any) -> None:
    """The labels in use, in the order of the grid; `look` replaces parts of their style."""
    from matplotlib.lines import Line2D

    shown = [label for label in chosen if label in used]
    lines = [Line2D([], [], linewidth=1.7, label=literal(label), **{**chosen[label].line, **look}) for label in shown]
    figure.legend(handles=lines, loc="outside right upper", frameon=False, fontsize=9, handlelength=2.8)


def literal(text: str) -> str:
    """A text that matplotlib shows as it is, dollars included, which would begin a formula."""
    return text.replace("$", r"\$")


def saved(figure: Figure, path: Path) -> Path:
    """Write a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
