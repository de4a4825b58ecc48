"""One quantity against another, a point with error bars for each label, such as accuracy against fidelity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.plots import legend, new_figure, plain_numbers, saved, tidy
from benchmarks.harness.results import Summary
from benchmarks.harness.styles import Style, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Points:
    """A panel: for each label (x, y), as `Results.final` gives; a label of which either is None is left out."""

    values: Mapping[str, tuple[Summary | None, Summary | None]]
    xlabel: str
    ylabel: str
    title: str = ""
    log_x: bool = False
    log_y: bool = False


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
        _draw(axes, panel, chosen)
    legend(figure, chosen, used, linestyle="")
    return saved(figure, path)


def _draw(axes: "Axes", panel: Points, chosen: Mapping[str, Style]) -> None:
    for label, (x, y) in panel.values.items():
        if x is not None and y is not None:
            style = chosen[label]
            axes.errorbar(
                x.mean, y.mean, xerr=x.std, yerr=y.std, color=style.colour, marker=style.marker, markersize=7,
                markeredgecolor="white", markeredgewidth=0.6, elinewidth=1.0, capsize=2, alpha=0.95,
            )  # fmt: skip
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel(panel.ylabel)
    tidy(axes, panel.title)
    if panel.log_x:
        axes.set_xscale("log", nonpositive="clip")
        plain_numbers(axes.xaxis)
    if panel.log_y:
        axes.set_yscale("log", nonpositive="clip")
        plain_numbers(axes.yaxis)
