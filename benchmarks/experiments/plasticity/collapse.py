"""Whether the curvature at the starts of tasks collapses before accuracy is lost (He et al. 2025, arXiv 2509.22335)."""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.experiments.plasticity.learner import ABOVE, ACCURACY
from benchmarks.harness import Summary, summarise
from benchmarks.harness.tables import Cell, Column, table

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

ACCURACY_ROW = "accuracy at the end"
RANKS = {
    "effective rank": "curvature/effective_rank",
    **{f"eigenvalues above {least:g}": f"curvature/above_{least:g}" for least in ABOVE},
    "eigenvalues above 1 % of the largest": "curvature/numerical_rank",
    "largest eigenvalue": "curvature/sharpness",
    "effective rank of gradients": "plasticity/gradient_effective_rank",
}
EXPLANATION = """At the start of each task, on 64 of its images with their new labels: the spectrum of the GGN of the
mean loss, all of its at most 576 eigenvalues that are not zero, by `core.landscape`. He et al. (2025) look at the
Hessian, of which they relate this part to training; the rest of it is not measured here. *below ¾* and
*below half* are the first task with a value below that part of the largest before, over the seeds that have one (their
number); *accuracy first*, in how many seeds the accuracy is below half at an earlier task. The columns behind leave out
the first task, at whose start nothing was learned. *r* is the correlation with the accuracy at the end of the
same task, seeds centred and pooled; *given the last* the partial one, given the accuracy of the task before: whether
the spectrum foretells a loss that has not begun. *back* is that of the accuracy of the task before with the spectrum,
given the spectrum before: whether the loss foretells the collapse. With 70 points a correlation beyond 0.24 would be
beyond noise at 5 % if they were independent."""


def collapse(one: Results) -> str:
    """A table of the curvature of one method against its accuracy; empty without records of it."""
    accuracy = by_task(one, ACCURACY)
    found = {name: by_task(one, metric) for name, metric in RANKS.items() if one.select(metric)}
    if not found or min(len(values) for values in accuracy.values()) < 4:
        return ""
    seeds = sorted(accuracy)
    columns = [
        Column("at the start of a task"), Column("task 1", 2), Column("task 2", 2), Column("last", 2),
        Column("below ¾"), Column("below half"), Column("accuracy first"), Column("r", 2), Column("given the last", 2),
        Column("back", 2),
    ]  # fmt: skip
    rows: list[list[Cell]] = [
        [
            name, *_course(values), _accuracy_first(accuracy, values), pooled(values, accuracy, seeds),
            forward(values, accuracy, seeds), backward(values, accuracy, seeds),
        ]
        for name, values in found.items()
    ]  # fmt: skip
    rows.append([ACCURACY_ROW, *_course(accuracy), None, None, None, None])
    return table(columns, rows)


def by_task(one: Results, metric: str) -> dict[int, list[float]]:
    """The values of the tasks in their order, by seed."""
    values: dict[int, list[float]] = {}
    for row in sorted(one.select(metric), key=lambda row: row["step"]):
        values.setdefault(row["seed"], []).append(row["value"])
    return values


def below(part: float, values: list[float]) -> int | None:
    """The first task, from 1, whose value is below a part of the largest before.

    >>> below(0.5, [1.0, 4.0, 3.0, 1.5]), below(0.5, [2.0, 1.0])
    (4, None)
    """
    return next((t + 1 for t in range(1, len(values)) if values[t] < part * max(values[:t])), None)


def pooled(x: dict[int, list[float]], y: dict[int, list[float]], seeds: list[int]) -> float | None:
    """The correlation of x_t and y_t over the tasks from the second on."""
    return correlation(_pool(x, seeds, 1), _pool(y, seeds, 1))


def forward(x: dict[int, list[float]], y: dict[int, list[float]], seeds: list[int]) -> float | None:
    """The partial correlation of x_t and y_t given y_{t−1}."""
    return partial(_pool(x, seeds, 1), _pool(y, seeds, 1), _pool(y, seeds, 0, -1))


def backward(x: dict[int, list[float]], y: dict[int, list[float]], seeds: list[int]) -> float | None:
    """The partial correlation of y_{t−1} and x_t given x_{t−1}, of tasks from the third on."""
    return partial(_pool(y, seeds, 1, -1), _pool(x, seeds, 2), _pool(x, seeds, 1, -1))


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Σ x y / √(Σ x² Σ y²) of centred values; None where one does not vary."""
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / size if size else None


def partial(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> float | None:
    """The correlation of what is left of x and of y when their regressions on z are taken away.

    >>> z = np.array([-1.0, 0.0, 1.0, 0.0])
    >>> round(partial(z + [0, 1, 0, -1], 3 * z + [0, 2, 0, -2], z), 6)
    1.0
    """
    rest = [values - z * (float(values @ z) / size if (size := float(z @ z)) else 0.0) for values in (x, y)]
    return correlation(*rest)


def _pool(values: dict[int, list[float]], seeds: list[int], begin: int, end: int | None = None) -> np.ndarray:
    """The values of tasks `begin` to `end` of all seeds, less the mean of each seed."""
    parts = [np.array(values[seed][begin:end]) for seed in seeds]
    return np.concatenate([part - part.mean() for part in parts])


def _course(values: dict[int, list[float]]) -> list[Cell]:
    """The first value, the second and the last over seeds, and the tasks at which they fall below ¾ and half."""
    ends: list[Summary] = [summarise(found[place] for found in values.values()) for place in (0, 1, -1)]
    falls = [[t for found in values.values() if (t := below(part, found)) is not None] for part in (0.75, 0.5)]
    return [*ends, *(f"{fmean(tasks):.1f} ({len(tasks)})" if tasks else None for tasks in falls)]


def _accuracy_first(accuracy: dict[int, list[float]], values: dict[int, list[float]]) -> str | None:
    """In how many of the seeds whose accuracy falls below half it does so at an earlier task than the values do."""
    falls = [(t, below(0.5, values[seed])) for seed, own in accuracy.items() if (t := below(0.5, own)) is not None]
    return f"{sum(later is None or t < later for t, later in falls)} of {len(falls)}" if falls else None
