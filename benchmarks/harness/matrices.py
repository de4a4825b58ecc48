"""Accuracy matrices a[t][j], the accuracy on experience j after experience t: read over seeds, and drawn."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from benchmarks.harness.plots import new_figure, saved
from benchmarks.harness.results import Results, Summary, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

Matrix: TypeAlias = Sequence[Sequence[Summary | float | None]]
"""Row t, column j; None, or not a number, where nothing is known, as of experiences that have not been seen."""

METRIC = "accuracy/experience_{}"
LEGIBLE = 12  # experiences up to which the cells have room for numbers
ACROSS = 4  # panels in a row


def accuracy_matrices(results: Results, label: str, metric: str = METRIC) -> dict[int, list[list[float | None]]]:
    """By seed, a[t][j] for j ≤ t, from records ``accuracy/experience_<j>`` at the step where each experience ended.

    Experiences that have not been seen are None, whatever was measured on them. A seed of which an experience is
    missing is left out.
    """
    curves: list[dict[int, dict[int, float]]] = []  # by experience j and seed: value by step
    while rows := results.select(metric.format(len(curves)), label):
        by_seed: dict[int, dict[int, float]] = {}
        for row in rows:
            if row["step"] is not None:
                by_seed.setdefault(row["seed"], {})[row["step"]] = row["value"]
        curves.append(by_seed)
    found = {}
    for seed in curves[0] if curves else ():
        steps = sorted(curves[0][seed])
        columns = [by_seed.get(seed, {}) for by_seed in curves]
        if len(steps) == len(columns):
            found[seed] = [
                [column.get(step) if j <= t else None for j, column in enumerate(columns)]
                for t, step in enumerate(steps)
            ]
    return found


def accuracy_matrix(results: Results, label: str, metric: str = METRIC) -> list[list[Summary | None]]:
    """The same, mean and standard deviation over seeds; empty where there is none."""
    matrices = list(accuracy_matrices(results, label, metric).values())
    size = len(matrices[0]) if matrices else 0
    return [[_summarised([matrix[t][j] for matrix in matrices]) for j in range(size)] for t in range(size)]


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
    size = max(len(matrix) for matrix in drawn.values())
    side = min(3.9, max(2.3, 0.42 * size + 0.7))
    titles = {label: textwrap.fill(label, int(11 * side)) for label in drawn}
    lines = max(written.count("\n") + 1 for written in titles.values())
    figure = new_figure(side * across + 0.9, (side + 0.3 + 0.2 * lines) * down + 0.2)
    grid = figure.subplots(down, across, squeeze=False)
    panels = [axes for row in grid for axes in row]
    for axes in panels[len(drawn) :]:
        axes.set_visible(False)
    for number, (axes, (label, matrix)) in enumerate(zip(panels, drawn.items())):
        image = _draw(axes, matrix, titles[label])
        if number % across == 0:
            axes.set_ylabel("after experience", fontsize=9)
        if number + across >= len(drawn):
            axes.set_xlabel("accuracy on experience", fontsize=9)
    figure.colorbar(image, ax=panels, label=title, shrink=min(1.0, 0.9 / down + 0.15), aspect=24, pad=0.02)
    return saved(figure, path)


def _draw(axes: "Axes", matrix: Matrix, title: str) -> "AxesImage":
    import numpy as np

    values = np.array([[_number(cell) for cell in row] for row in matrix], dtype=float)
    image = axes.imshow(np.ma.masked_invalid(values), vmin=0.0, vmax=1.0, cmap="cividis", aspect="equal")
    axes.set_title(title, fontsize=9.5, loc="left")
    rows, columns = values.shape
    if max(rows, columns) <= LEGIBLE:
        for t, j in zip(*np.nonzero(np.isfinite(values))):
            value = values[t, j]
            ink = "white" if value < 0.55 else "black"
            axes.text(j, t, f"{value:.2f}".replace("0.", "."), ha="center", va="center", fontsize=7.5, color=ink)
    every = max(1, math.ceil(columns / LEGIBLE))
    axes.set_xticks(range(0, columns, every), [str(j + 1) for j in range(0, columns, every)])
    axes.set_yticks(range(0, rows, every), [str(t + 1) for t in range(0, rows, every)])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    return image


def _number(cell: Summary | float | None) -> float:
    if cell is None:
        return math.nan
    return cell.mean if isinstance(cell, Summary) else float(cell)


def _summarised(cells: Sequence[float | None]) -> Summary | None:
    known = [cell for cell in cells if cell is not None]
    return summarise(known) if known else None
