"""Figures of the reports: curves with bands, and dots with error bars; PNG files that need no display."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness.results import Summary
from benchmarks.harness.styles import MUTED, Style, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

DPI = 150


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


def plot_dots(path: Path, panels: Sequence[Dots], *, labels: Sequence[str]) -> Path:
    """Panels side by side with one row per label, mean ± std. A label absent from one panel keeps its row there."""
    shown = [label for label in labels if any(panel.values.get(label) for panel in panels)]
    longest = max((len(label) for label in shown), default=0)
    figure = new_figure(0.08 * longest + 3.6 * len(panels) + 0.6, 1.2 + 0.3 * len(shown))
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    chosen = styles(labels)
    for axes, panel in zip(all_axes, panels):
        _draw_dots(axes, panel, shown, chosen)
    return saved(figure, path)


def _draw_curves(axes: "Axes", panel: Curves, chosen: Mapping[str, Style]) -> None:
    for mark in panel.marks:
        axes.axvline(mark, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
    for place, (label, curve) in enumerate(panel.series.items()):
        style = chosen[label]
        every = max(1, len(curve) // 10)
        steps = [step for step, _ in curve]
        means = [summary.mean for _, summary in curve]
        spreads = [summary.std or 0.0 for _, summary in curve]
        axes.plot(steps, means, linewidth=1.7, markevery=(place % every, every), **style.line)
        if any(spreads):
            lower = [mean - spread for mean, spread in zip(means, spreads)]
            upper = [mean + spread for mean, spread in zip(means, spreads)]
            axes.fill_between(steps, lower, upper, color=style.colour, alpha=0.15, linewidth=0)
    axes.set_ylabel(panel.ylabel)
    tidy(axes, panel.title)
    if panel.log:
        axes.set_yscale("log", nonpositive="clip")
        positive = [summary.mean for curve in panel.series.values() for _, summary in curve if summary.mean > 0]
        if positive:  # a band that reaches below zero must not stretch the axis
            axes.set_ylim(bottom=max(axes.get_ylim()[0], min(positive) / 3))


def _draw_dots(axes: "Axes", panel: Dots, shown: Sequence[str], chosen: Mapping[str, Style]) -> None:
    if panel.reference is not None:
        axes.axvline(panel.reference, color=MUTED, linewidth=1.0, linestyle="--", zorder=0)
    for row, label in enumerate(shown):
        summary = panel.values.get(label)
        if summary is not None:
            style = chosen[label]
            axes.errorbar(
                summary.mean, row, xerr=summary.std, color=style.colour, marker=style.marker, capsize=3, markersize=6.5
            )
    axes.set_yticks(range(len(shown)), shown)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel(panel.xlabel)
    tidy(axes, panel.title)
    axes.tick_params(axis="y", length=0)
    if panel.log:
        axes.set_xscale("log", nonpositive="clip")
        plain_numbers(axes.xaxis)


def new_figure(width: float, height: float) -> "Figure":
    """A figure without pyplot, so that nothing global changes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: "Axes", title: str) -> None:
    """The title, a light grid, and no frame."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(color=MUTED, labelsize=9)


def plain_numbers(axis: "Axis") -> None:
    """0.3 rather than 3 × 10⁻¹, where a logarithmic axis spans about a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    if low > 0 and high / low < 30:
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def legend(figure: "Figure", chosen: Mapping[str, Style], used: Collection[str], **look: Any) -> None:
    """The labels in use, in the order of the grid; `look` replaces parts of their style."""
    from matplotlib.lines import Line2D

    shown = [label for label in chosen if label in used]
    lines = [Line2D([], [], linewidth=1.7, label=label, **{**chosen[label].line, **look}) for label in shown]
    figure.legend(handles=lines, loc="outside right upper", frameon=False, fontsize=9, handlelength=2.8)


def saved(figure: "Figure", path: Path) -> Path:
    """Write a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path
