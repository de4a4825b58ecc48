"""Accuracy matrices: the accuracy on experience j after experience t, from records and as heat maps."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from benchmarks.harness.plots import literal, new_figure, saved
from benchmarks.harness.results import Results, Summary, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

Matrix: TypeAlias = Sequence[Sequence[Summary | float | None]]
"""Accuracies a[t][j] on experience j after experience t; None, or not a number, where nothing is known."""
METRIC = "accuracy/experience_{}"
LEGIBLE = 12  # experiences up to which the cells have room for numbers
ACROSS = 4  # matrices in a row


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
